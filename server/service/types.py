"""What the service takes and gives: the one form that every route and servicer translates to and from.

Nothing here knows of JSON, SSE, OpenAI or protobuf.
"""

from __future__ import annotations

import msgspec

from engine.request import SamplingParams, TokenLogprobs


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One call: `n` outputs of one prompt. `prompt` is text, or token ids taken as they are."""

    request_id: str  # made by the server; the client's own id, if any, is only echoed
    prompt: str | list[int]
    params: SamplingParams
    model: str | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    priority: int = 0
    deadline_s: float | None = None  # seconds from admission after which it ends with RequestTimeout
    add_special_tokens: bool = True  # False where a chat template has put them in already
    client_names: dict[str, str] = {}  # what the client calls a field of ours, where that is another name: for errors
    num_prompts: int = 1  # of the client's call that this is one of: together they may leave so much unread


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache
    completion_tokens: int  # over all n outputs


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds since admission, apart from queue_ms, which is the wait before the first step."""

    queue_ms: float
    ttft_ms: float
    total_ms: float


class Chunk(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Text and tokens that output `index` gained. The last chunk of each output has `finish_reason`."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None  # "stop" | "length"
    stop_reason: str | int | None = None  # the stop string or stop token that ended it
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids, where asked for
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # of output 0 alone


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """Comes once, after the last chunk of the last output."""

    usage: Usage
    timing: Timing
