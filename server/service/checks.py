"""Validates a request before it costs any work. Each refusal names the field.

The engine's own rules for token ids, lengths and ranges are in `engine.messages.check_submit`, which runs after tokenising.
"""

from __future__ import annotations

from typing import Protocol

from engine.errors import InvalidRequest, UnknownModel
from engine.request import BOUNDS, SamplingParams
from engine.slo import SloName
from server.service.types import GenerationRequest, Identity


class ServiceSettings(Protocol):
    """The settings that GenerateService reads. `server.settings.Settings` implements this protocol."""

    @property
    def model_name(self) -> str: ...
    @property
    def max_n(self) -> int: ...
    @property
    def max_logprobs(self) -> int: ...
    @property
    def max_prompt_logprobs(self) -> int: ...
    @property
    def max_stop_strings(self) -> int: ...
    @property
    def max_stop_len(self) -> int: ...
    @property
    def max_waiting_text_bytes(self) -> int: ...
    @property
    def slo_class(self) -> SloName | None: ...
    @property
    def priority_ceiling(self) -> int: ...


def check_request(request: GenerationRequest, identity: Identity, settings: ServiceSettings) -> None:
    """Validate everything about a request that does not depend on the prompt's tokens. Raises InvalidRequest or UnknownModel."""
    check_model(request.model, settings.model_name)
    if not request.prompt:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if isinstance(request.prompt, str):
        check_text(request.prompt, "prompt")
    if not 1 <= request.n <= settings.max_n:
        raise InvalidRequest(f"n is {request.n}: it must lie between 1 and {settings.max_n}", param="n")
    if request.priority is not None:
        _check_priority(request.priority, identity.priority_ceiling)
    if request.deadline_s is not None and not request.deadline_s > 0:
        raise InvalidRequest("the deadline must be more than 0", param="deadline_ms")
    _check_stops(request.stop, settings)
    for i, word in enumerate(request.bad_words):
        if not word:
            raise InvalidRequest(f"bad_words[{i}] is empty", param="bad_words")
        check_text(word, f"bad_words[{i}]")
    truncate = request.truncate_prompt_tokens
    if truncate is not None and not (truncate == -1 or truncate > 0):
        raise InvalidRequest(
            f"truncate_prompt_tokens is {truncate}: it must be -1, for as many as the context allows, or at least 1",
            param="truncate_prompt_tokens",
        )


def _check_priority(priority: int, ceiling: int) -> None:
    low, high, _ = BOUNDS["priority"]
    if not low <= priority <= high:
        raise InvalidRequest(f"priority is {priority}: it must lie between {low} and {high}", param="priority")
    if priority < ceiling:
        raise InvalidRequest(
            f"priority is {priority}: it must be at least {ceiling}, the most urgent priority that you may ask for",
            param="priority",
        )


def check_model(model: str | None, served: str) -> None:
    if model and model != served:  # an empty name counts as left out, as at other servers
        raise UnknownModel(f"there is no model {model[:256]!r} here: this server has {served!r}", param="model")


def check_text(text: str, name: str) -> None:
    """Raise InvalidRequest if `text` has half a surrogate pair, which is no character. JSON's \\u escapes can write one."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{name} has a lone surrogate, U+{ord(text[error.start]):04X}, at character {error.start}", param=name
        ) from error


def check_logprobs(params: SamplingParams, settings: ServiceSettings, *, prompt_tokens: int, outputs: int) -> None:
    """Raise InvalidRequest if one answer would hold too many log-probabilities. Each alternative counts."""
    if params.prompt_logprobs is not None:
        num = prompt_tokens * (1 + params.prompt_logprobs)
        if num > settings.max_prompt_logprobs:
            raise InvalidRequest(
                f"prompt_logprobs {params.prompt_logprobs} over {prompt_tokens} prompt tokens would report {num} "
                f"log-probabilities: at most {settings.max_prompt_logprobs} are allowed",
                param="prompt_logprobs",
            )
    if params.logprobs is not None:
        num = outputs * params.max_tokens * (1 + params.logprobs)
        if num > settings.max_logprobs:
            raise InvalidRequest(
                f"logprobs {params.logprobs} over {outputs} outputs of {params.max_tokens} tokens would report {num} "
                f"log-probabilities: at most {settings.max_logprobs} are allowed",
                param="logprobs",
            )


def _check_stops(stops: tuple[str, ...], settings: ServiceSettings) -> None:
    if len(stops) > settings.max_stop_strings:
        raise InvalidRequest(f"stop has {len(stops)} strings: at most {settings.max_stop_strings} are allowed", param="stop")
    for stop in stops:
        if not stop:
            raise InvalidRequest("stop has an empty string", param="stop")
        if len(stop) > settings.max_stop_len:
            raise InvalidRequest(
                f"stop has a string of {len(stop)} characters: at most {settings.max_stop_len} are allowed", param="stop"
            )
        check_text(stop, "stop")
