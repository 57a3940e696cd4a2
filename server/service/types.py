"""The types that GenerateService takes and returns. Every HTTP route and gRPC method translates to and from these types.

These types do not depend on JSON, SSE, OpenAI or protobuf.
"""

from __future__ import annotations

import msgspec

from engine.request import BOUNDS, CachedTokens, SamplingParams, TokenLogprobs
from engine.slo import SloName


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Describes who sent a request, and what the request may ask for."""

    tenant: str = "anonymous"  # requests of different tenants share the engine fairly
    priority_ceiling: int = int(BOUNDS["priority"].low)  # most urgent priority allowed; a smaller number runs first
    slo: SloName | None = None  # class of requests that name none; None: nothing is promised to such a request
    salt: str = ""  # requests share blocks of the prefix cache only if their salts are equal


class Progress(msgspec.Struct, kw_only=True):
    """What one generation has used so far. The service sets `completion_tokens` at the end, and the others at the first token."""

    prompt_tokens: int = 0
    cached: CachedTokens = CachedTokens()
    queue_s: float = 0.0
    ttft_s: float | None = None  # None until the first token
    completion_tokens: int = 0


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt and the `n` outputs wanted for it. `prompt` is text, or token ids that are used unchanged."""

    request_id: str  # made by the server; an id that the client sends is only echoed
    prompt: str | list[int]
    params: SamplingParams
    model: str | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False  # an output that a stop string or stop token ends has its text
    skip_special_tokens: bool = True  # special tokens have no text in the outputs
    spaces_between_special_tokens: bool = True
    bad_words: tuple[str, ...] = ()  # texts that no output may contain
    truncate_prompt_tokens: int | None = None  # use this many last tokens of the prompt; -1: as many as the context allows
    return_token_ids: bool = False  # the first chunk of each output has the prompt's token ids
    text_offsets: bool = False  # chunks with log-probabilities also say where the text of each token begins
    fits_max_tokens: bool = False  # max_tokens is a default of the server: it may be lowered to what the context leaves
    priority: int | None = None  # a smaller number runs first; None: 0, or the identity's ceiling if that is larger
    slo_class: SloName | None = None  # None: the identity's class
    deadline_s: float | None = None  # seconds from admission after which the request ends with RequestTimeout
    add_special_tokens: bool = True  # False if a chat template has written the special tokens already
    client_names: dict[str, str] = {}  # our field name -> the name in the client's request, where they differ: for errors
    num_prompts: int = 1  # prompts in the client's call; together they share one limit on unread events
    progress: Progress | None = None  # updated by the service, for the log and for the usage in the events of a stream


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    cached: CachedTokens  # prompt tokens that were found in the KV cache
    completion_tokens: int  # number of generated tokens of all n outputs together

    @property
    def cached_tokens(self) -> int:
        return self.cached.total


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Durations in milliseconds. `ttft_ms` and `total_ms` count from the start of `generate`."""

    queue_ms: float  # from the engine's receipt of the request to its first step
    ttft_ms: float  # until the first token
    total_ms: float


class Chunk(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Text and tokens that output `index` gained. The last chunk of each output has `finish_reason`."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None  # "stop" or "length" in the last chunk of an output, else None
    stop_reason: str | int | None = None  # the stop string or stop token that ended the output
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids, if requested
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # only for output 0, if requested
    text_offsets: list[int] | None = None  # for each of token_ids, the place in the output's text where its text begins
    prompt_token_ids: list[int] | None = None  # in the first chunk of each output, if requested


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """The last item that `generate` yields, after the last chunk of the last output. It comes once."""

    usage: Usage
    timing: Timing
