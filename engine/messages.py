"""Messages between an API worker and an engine process: msgspec structs in msgpack over ZeroMQ, never pickle.

    worker --> engine   Hello, Submit, Abort
    engine --> worker   Welcome, Outputs, Heartbeat

A worker says Hello on every (re)connection; the engine then forgets whatever that worker had asked before, and answers
Welcome. The worker keeps prompt, params and the tokens received of each stream, so after an engine's death it sends each
of them again as a Submit whose `outputs` are what the client already has.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from engine.config import ModelLimits
from engine.errors import ContextTooLong, InvalidRequest
from engine.request import BOUNDS, SamplingParams, TokenEvent


class Hello(msgspec.Struct, frozen=True, tag=True):
    worker: str


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Run a request. `seed` is always set: the worker draws one where the client gave none, so a resumed stream repeats it."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    seed: int
    outputs: list[int] = []  # tokens of an earlier life, in order
    priority: int = 0
    fork_of: str | None = None  # request id of the sibling (n > 1) whose prompt blocks to share
    salt: str = ""


def check_submit(submit: Submit, limits: ModelLimits) -> None:
    """Refuse what this model cannot run: InvalidRequest or ContextTooLong, naming the field. The worker asks at its door,
    the engine again."""
    params = submit.params
    if not submit.prompt:
        raise InvalidRequest("the prompt is empty: it must have at least one token", param="prompt")
    for name, value in (("seed", submit.seed), ("priority", submit.priority)):
        if not BOUNDS[name].low <= value <= BOUNDS[name].high:
            raise InvalidRequest(f"{name} is {value}: it must lie between {BOUNDS[name].low} and {BOUNDS[name].high}", param=name)
    check_ids(submit.prompt, limits.vocab_size, "prompt")
    check_ids(submit.outputs, limits.vocab_size, "outputs")
    check_ids(params.stop_token_ids, limits.vocab_size, "stop_token_ids")
    check_ids(params.logit_bias or (), limits.vocab_size, "logit_bias")
    if len(submit.prompt) >= limits.max_model_len:
        raise ContextTooLong(
            f"the prompt has {len(submit.prompt)} tokens; with the model's context of {limits.max_model_len} "
            f"it can have {limits.max_model_len - 1} at most",
            param="prompt",
        )
    if len(submit.prompt) + params.max_tokens > limits.max_model_len:
        raise ContextTooLong(
            f"the prompt's {len(submit.prompt)} tokens and max_tokens {params.max_tokens} come to more than the model's "
            f"context of {limits.max_model_len}: send a shorter prompt or max_tokens {limits.max_model_len - len(submit.prompt)}",
            param="max_tokens",
        )
    if len(submit.outputs) >= params.max_tokens:
        raise InvalidRequest(
            f"outputs has {len(submit.outputs)} tokens, and max_tokens is {params.max_tokens}: nothing is left to do",
            param="outputs",
        )


def check_ids(ids: Collection[int], vocab_size: int, name: str) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise InvalidRequest(f"{name} has token id {wrong}: it must lie between 0 and {vocab_size - 1}", param=name)


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_ids: list[str]


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    limits: ModelLimits  # max_model_len here is the one in force
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_step_tokens: int
    device: str
    pid: int
    startup: dict[str, float] = {}  # seconds of each of `engine.startup.PHASES` that there was


class Welcome(msgspec.Struct, frozen=True, tag=True):
    info: EngineInfo


class Outputs(msgspec.Struct, frozen=True, tag=True, gc=False):
    """What one step says to one worker."""

    events: list[TokenEvent]


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters since start (num_* of requests, tokens, steps) and gauges now. Conservation:

    num_accepted = num_finished + num_aborted + running + waiting
    """

    step: int = 0
    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    blocks_total: int = 0
    num_accepted: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0  # of admitted requests, counted once each
    cached_tokens: int = 0  # of those, found in the prefix cache
    output_tokens: int = 0
    step_seconds: float = 0.0  # summed over all steps
    exposed_cpu_seconds: float = 0.0  # of it, time in which the device had nothing to do


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """Sent at least every `HEARTBEAT_SECONDS` while the engine's loop turns, busy or idle. `preparing`: a turn of an idle one may
    take seconds, for there is something left to capture or to rehearse."""

    stats: EngineStats
    preparing: bool = False


HEARTBEAT_SECONDS = 0.25

WorkerMessage = Hello | Submit | Abort
EngineMessage = Welcome | Outputs | Heartbeat

encode = msgspec.msgpack.Encoder().encode
decode_worker_message = msgspec.msgpack.Decoder(WorkerMessage).decode
decode_engine_message = msgspec.msgpack.Decoder(EngineMessage).decode
