"""What a step's result means for a request: is this its last token, and what is told with its first one."""

from __future__ import annotations

from engine.plan import StepPlan
from engine.request import FinishReason, Request, Status, TokenEvent, TokenLogprobs


def set_finish(event: TokenEvent, request: Request) -> bool:
    """Mark `event`, which has the newest token of `request`, as its last where it is. A stop token outdoes the length."""
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
    """What goes with a request's first token, and with no other."""
    event.num_cached = request.num_cached
    event.queue_s = (request.scheduled_at or request.arrival) - request.arrival
    event.prompt_logprobs = request.prompt_logprobs
    request.prompt_logprobs = None


def collect_prompt_logprobs(plan: StepPlan, requests: list[Request], chunks: dict[int, list[TokenLogprobs]]) -> None:
    """Add the chunks' to their requests. A prompt that is computed again brings some a second time: each counts once."""
    for index, chunk in chunks.items():
        request = requests[index]
        if request.status is Status.FINISHED or request.num_outputs:
            continue
        if request.prompt_logprobs is None:
            request.prompt_logprobs = [None]  # nothing comes before position 0
        known = len(request.prompt_logprobs) - (plan.starts[index] + 1)
        request.prompt_logprobs += chunk[known:]
