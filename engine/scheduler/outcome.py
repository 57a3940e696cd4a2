"""Functions that complete the event of a request's first token, of its last token and of its failure."""

from __future__ import annotations

import logging

from engine.errors import InvalidRequest, NumericalError
from engine.plan import StepPlan
from engine.request import FinishReason, Request, RequestFailure, Status, TokenEvent, TokenLogprobs

log = logging.getLogger("tidegate.engine")


def set_finish(event: TokenEvent, request: Request) -> bool:
    """Return whether the newest token of `request` is its last one, and if so, set the reason in `event`.

    A stop token takes precedence over the length limit. With max_tokens 0, the event loses its only token.
    """
    if not request.params.max_tokens:
        event.tokens = []
        event.logprobs = None if event.logprobs is None else []
        event.finish = FinishReason.LENGTH
        return True
    token = event.tokens[-1]
    if token in request.stop_ids and request.num_outputs >= request.params.min_tokens:
        event.finish = FinishReason.STOP
        event.stop_token = token
        return True
    if len(request.tokens) >= request.end_len:
        event.finish = FinishReason.LENGTH
        return True
    return False


def add_first(event: TokenEvent, request: Request) -> None:
    """Add to `event` what is reported only with a request's first token."""
    event.cached = request.cached
    event.queue_s = (request.scheduled_at or request.arrival) - request.arrival
    event.prompt_logprobs = request.prompt_logprobs
    request.prompt_logprobs = None


def failure_event(request: Request, step: int) -> TokenEvent:
    """Log that the logits of `request` were not finite in `step`, and return the event that ends the request."""
    number = request.num_outputs + 1
    log.error(
        "a request's logits are not finite (NaN or infinity): the request is ended",
        extra={"request_id": request.request_id, "step": step, "output_token": number},
    )
    message = f"the model computed logits that are not finite (NaN or infinity) for output token {number}"
    failure = RequestFailure(NumericalError.__name__, message)
    return TokenEvent(request.request_id, [], FinishReason.ERROR, failure=failure)


def no_choice_event(request: Request) -> TokenEvent:
    """Return the event that ends `request` because its own fields exclude every token at the next position."""
    params, number = request.params, request.num_outputs + 1
    given = {
        "allowed_token_ids": params.allowed_token_ids is not None,
        "bad_words": bool(params.bad_words),  # the request's, or those of the model's generation_config.json
        "min_tokens": request.num_outputs < params.min_tokens,
    }
    *others, last = [name for name, is_given in given.items() if is_given] or ["min_tokens"]
    names = f"{', '.join(others)} and {last} together exclude" if others else f"{last} excludes"
    message = f"{names} every token that could be output token {number}: allow more tokens"
    failure = RequestFailure(InvalidRequest.__name__, message, (others or [last])[0])
    return TokenEvent(request.request_id, [], FinishReason.ERROR, failure=failure)


def collect_prompt_logprobs(plan: StepPlan, requests: list[Request], chunks: dict[int, list[TokenLogprobs]]) -> None:
    """Append each chunk's prompt log-probabilities to its request.

    A prompt that is computed again after a preemption yields some positions twice; each position is kept once.
    """
    for index, chunk in chunks.items():
        request = requests[index]
        if request.status is Status.FINISHED or request.num_outputs:
            continue
        if request.prompt_logprobs is None:
            request.prompt_logprobs = [None]  # position 0 has no log-probability
        known = len(request.prompt_logprobs) - (plan.starts[index] + 1)
        request.prompt_logprobs += chunk[known:]
