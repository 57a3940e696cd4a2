"""Messages between an API worker and an engine process: msgspec structs in msgpack over ZeroMQ, never pickle.

    worker --> engine   Hello, Submit, Abort, ResetCache
    engine --> worker   Welcome, StepEvents, Heartbeat, CacheReset

A worker sends Hello on every connection and reconnection. The engine then forgets all earlier requests of that worker and
answers with Welcome. The worker keeps the prompt, the params and the received tokens of each stream. After an engine has
died, the worker sends each stream again as a Submit whose `outputs` are the tokens that the client already has.

Token ids travel as int32 little-endian bytes, four bytes a token: `pack_tokens` and `unpack_tokens`.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Collection, Iterable
from typing import Literal, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from engine.config import ModelLimits
from engine.errors import ContextTooLong, InvalidRequest
from engine.request import BOUNDS, ENGINE_SEED_MAX, SamplingParams, TokenEvent
from engine.slo import DEFAULT_SLO, SloName

TOKEN_BYTES = 4
INT32_MAX = 2**31 - 1


def pack_tokens(ids: Iterable[int], name: str = "prompt") -> bytes:
    """Return token ids as int32 little-endian bytes. Raises InvalidRequest, naming the field `name`, for an id outside int32."""
    try:
        packed = array("i", ids)
    except OverflowError:
        raise InvalidRequest(f"{name} has a token id outside 0 to {INT32_MAX}, the range of token ids", param=name) from None
    return _little_endian(packed).tobytes()


def unpack_tokens(data: bytes) -> array[int]:
    """Return the token ids that `pack_tokens` packed. The length of `data` must be a multiple of four."""
    tokens = array("i")
    tokens.frombytes(data)
    return _little_endian(tokens)


def _little_endian(tokens: array[int]) -> array[int]:
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The first message on every connection of a worker. `worker` is the worker's name."""

    worker: str


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Asks the engine to run a request. `seed` is always set: the worker picks a random one if the client gave none, so a
    resumed stream repeats its tokens. It is a number from 0 to 2^64 - 1 (`engine.request.output_seed`)."""

    request_id: str
    prompt: bytes  # packed token ids
    params: SamplingParams
    seed: int
    outputs: bytes = b""  # packed token ids that an earlier engine already generated for this request, in order
    priority: int = 0
    fork_of: str | None = None  # request id of the sibling (n > 1) whose prompt blocks to share
    salt: str = ""
    tenant: str = ""  # requests of different tenants share the engine fairly
    slo: SloName = DEFAULT_SLO
    promised: bool = False  # the class was named by the client or the operator: refuse the request if its first token comes late
    deadline_s: float | None = None  # seconds, from the engine's receipt, after which nobody wants the output any more
    resumed: bool = False  # an engine has accepted the request before: no prediction refuses it, whatever its deadline

    @property
    def num_prompt(self) -> int:
        return len(self.prompt) // TOKEN_BYTES

    @property
    def num_outputs(self) -> int:
        return len(self.outputs) // TOKEN_BYTES


def check_submit(submit: Submit, limits: ModelLimits) -> None:
    """Validate a request against the model's limits. Workers validate before they send, and the engine validates again.

    Raises InvalidRequest or ContextTooLong, naming the field.
    """
    params, num_prompt = submit.params, submit.num_prompt
    if not submit.prompt:
        raise InvalidRequest("the prompt is empty: it must have at least one token", param="prompt")
    ranges = {"seed": (submit.seed, 0, ENGINE_SEED_MAX), "priority": (submit.priority, *BOUNDS["priority"][:2])}
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise InvalidRequest(f"{name} is {value}: it must lie between {low} and {high}", param=name)
    if submit.deadline_s is not None and not submit.deadline_s > 0:
        raise InvalidRequest(f"the deadline is {submit.deadline_s:g} s: it must be more than 0", param="deadline_ms")
    check_ids(_as_array("prompt", submit.prompt), limits.vocab_size, "prompt")
    check_ids(_as_array("outputs", submit.outputs), limits.vocab_size, "outputs")
    check_ids(params.stop_token_ids, limits.vocab_size, "stop_token_ids")
    check_ids(params.logit_bias or (), limits.vocab_size, "logit_bias")
    check_ids(params.allowed_token_ids or (), limits.vocab_size, "allowed_token_ids")
    for word in params.bad_words:
        check_ids(word, limits.vocab_size, "bad_words")
    if num_prompt >= limits.max_model_len:
        raise prompt_too_long(num_prompt, limits.max_model_len)
    if num_prompt + params.max_tokens > limits.max_model_len:
        raise _both_too_long(num_prompt, params.max_tokens, limits.max_model_len)
    if submit.num_outputs >= max(1, params.max_tokens):
        raise InvalidRequest(
            f"outputs has {submit.num_outputs} tokens, and max_tokens is {params.max_tokens}: nothing is left to generate",
            param="outputs",
        )


# Programs read the numbers out of the words "maximum context length is N tokens. However, you requested M tokens", as OpenAI has
# them, so that they can shorten a conversation, lower max_tokens or choose another model. LangChain looks for the words
# "prompt is too long".


def prompt_too_long(num_tokens: int | None, max_model_len: int, name: str = "prompt") -> ContextTooLong:
    """Return the error for a prompt that leaves no room for an answer. `num_tokens` is None if it was not tokenised to its end.
    `name` is the name of the prompt's field in the request."""
    num = f"more than {max_model_len - 1}" if num_tokens is None else num_tokens
    return ContextTooLong(
        f"This model's maximum context length is {max_model_len} tokens. However, you requested "
        f"{(num_tokens or max_model_len) + 1} tokens or more. The prompt is too long: it has {num} tokens, and may have "
        f"{max_model_len - 1} at most.",
        param=name,
    )


def _both_too_long(num_prompt: int, max_tokens: int, max_model_len: int) -> ContextTooLong:
    return ContextTooLong(
        f"This model's maximum context length is {max_model_len} tokens. However, you requested {num_prompt + max_tokens} tokens "
        f"({num_prompt} in the prompt, {max_tokens} in the completion): the prompt's {num_prompt} tokens and max_tokens "
        f"{max_tokens} may come to {max_model_len} at most.",
        param="max_tokens",
    )


def check_ids(ids: Collection[int] | npt.NDArray[np.int32], vocab_size: int, name: str) -> None:
    """Raise InvalidRequest, naming the field `name`, if a token id is not in the vocabulary."""
    if len(ids) == 0:
        return
    low, high = (int(ids.min()), int(ids.max())) if isinstance(ids, np.ndarray) else (min(ids), max(ids))
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise InvalidRequest(f"{name} has token id {wrong}: it must lie between 0 and {vocab_size - 1}", param=name)


def _as_array(name: str, data: bytes) -> npt.NDArray[np.int32]:
    if len(data) % TOKEN_BYTES:
        raise InvalidRequest(
            f"{name} has {len(data)} bytes: token ids travel as int32, so the length must be a multiple of {TOKEN_BYTES}",
            param=name,
        )
    return np.frombuffer(data, "<i4")


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Asks the engine to end requests. Ids of requests that are not running or waiting are ignored."""

    request_ids: list[str]


TierName = Literal["gpu", "host", "disk"]  # a tier of the KV cache (`engine.plan.Tier`)
TIER_NAMES: tuple[TierName, ...] = get_args(TierName)


class ResetCache(msgspec.Struct, frozen=True, tag=True):
    """Asks the engine to forget the blocks that `tiers` of its KV cache have of prefixes. Its CacheReset has the same number."""

    number: int
    tiers: list[TierName]


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The facts about itself that an engine sends to each worker, once per connection."""

    model: str
    limits: ModelLimits  # max_model_len is what the engine accepts, which may be less than the model's own
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_step_tokens: int
    device: str
    pid: int
    startup: dict[str, float] = {}  # seconds of each start-up phase that took place, by its name in `engine.startup.PHASES`


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The engine's answer to Hello. A Welcome without a Hello before it means that the worker must connect again."""

    info: EngineInfo


class StepEvents(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The events of one step that concern one worker's requests."""

    events: list[TokenEvent]


class CacheReset(msgspec.Struct, frozen=True, tag=True):
    """The engine's answer to ResetCache, once it has forgotten the blocks. `blocks` is how many each of the tiers had."""

    number: int
    blocks: dict[TierName, int]


class TierStats(msgspec.Struct, frozen=True, kw_only=True):
    """What a tier below the device holds now (blocks), and what has happened to it since the start. All add up over engines."""

    blocks_used: int = 0
    blocks_limit: int = 0
    cached_tokens: int = 0  # the part of EngineStats.cached_tokens that was loaded from this tier for the request
    num_demoted: int = 0  # blocks that were moved to it
    num_promoted: int = 0  # blocks that were moved from it to the device
    num_failed: int = 0  # moves to it or from it that failed
    num_evicted: int = 0  # blocks whose content made room for others
    num_dropped: int = 0  # blocks that were found to be torn, changed or of another model
    num_unsaved: int = 0  # blocks that should have been moved to it and were not, as it was full, busy or off
    promoted_bytes: int = 0  # of num_promoted
    demoted_bytes: int = 0  # of num_demoted
    promote_seconds: float = 0.0  # time in which blocks were on their way from it
    num_on: int = 1  # engines whose tier works now: a disk that fails is off
    outages: dict[str, int] = {}  # times that it was turned off, by the reason


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters since start (num_* of requests, tokens, steps, seconds) and gauges of the present moment. At every moment:

    num_accepted = num_finished + num_aborted + num_failed + running + waiting
    """

    step: int = 0
    running: int = 0
    waiting: int = 0
    loading: int = 0  # waiting requests whose prefix is on its way from a lower tier
    blocks_used: int = 0
    blocks_cached: int = 0
    blocks_total: int = 0
    num_accepted: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_failed: int = 0  # accepted requests that ended with an error: NaN in their logits, or fields that exclude every token
    num_preemptions: int = 0
    prompt_tokens: int = 0  # of admitted requests, each request counted once
    cached_tokens: int = 0  # the part of prompt_tokens that was found in the prefix cache
    output_tokens: int = 0
    log_lines_dropped: int = 0
    kernels_compiled: int = 0  # kernels that were not in the cache of compiled kernels when they were first needed
    step_seconds: float = 0.0  # duration of all steps together
    exposed_cpu_seconds: float = 0.0  # the part of step_seconds in which the device had nothing to do
    gc_pause_seconds: float = 0.0  # longest pause of the engine process by Python's garbage collector
    device_seconds: float = 0.0  # time that the device has spent on steps
    seq_limit: int = 0  # largest number of requests that may run; 0 before the first step, as for the two limits below
    token_limit: int = 0  # largest number of tokens of a step
    chunk_limit: int = 0  # largest slice of one prompt while other prompts want a part of the step
    batching: str = "fixed"  # the policy that sets the three limits now
    limit_changes: dict[str, int] = {}  # changes of the three limits, by their reason
    work_seconds: float = 0.0  # predicted duration of the work that waits
    predicted_ttft_over_target: float = 0.0  # time to first token predicted for a request that arrives now / its target
    predicted_itl_over_target: float = 0.0  # predicted duration of the next step / the tightest target among the decodes
    tiers: dict[str, TierStats] = {}  # of the tiers that there are, by their name: host, disk
    load_decisions: dict[str, int] = {}  # whether prefixes in lower tiers were loaded or computed (`engine/kvcache/gate.py`)


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """Sent at least every HEARTBEAT_SECONDS while the engine's loop runs, busy or idle.

    `preparing` means that an idle engine still captures graphs or warms up, so one iteration of its loop may take seconds.
    """

    stats: EngineStats
    preparing: bool = False


HEARTBEAT_SECONDS = 0.25

WorkerMessage = Hello | Submit | Abort | ResetCache
EngineMessage = Welcome | StepEvents | Heartbeat | CacheReset

encode = msgspec.msgpack.Encoder().encode
decode_worker_message = msgspec.msgpack.Decoder(WorkerMessage).decode
decode_engine_message = msgspec.msgpack.Decoder(EngineMessage).decode
