"""The contract between scheduler and runner: a StepPlan goes to the runner, a StepResult comes back.

A running request owns a batch row until it ends or is preempted. The runner keeps each row's state on the device: block
table, latest token and sampling state. A plan therefore carries only changes: the rows admitted, the block tables grown,
and which positions of which rows to run. The plan of a decode step of 256 requests is little more than three lists of
256 integers.

    admitted    row 7 := tokens, blocks, params              once per admission, again after a preemption
    grown       row 7 += [block 41]                          once per block_size tokens
    copies      block 41 := block 8                          forks, and moves between the tiers of the KV cache
    slices      row 7: positions [start, start + num)        every step
    spilled     row 7: slots of the host, then blocks        every step of a row whose context is larger than the GPU's cache
    samples     indices of the slices whose last position yields a token
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import msgspec

from engine.config import EngineConfig, ModelLimits
from engine.request import NO_CHOICE as NO_CHOICE
from engine.request import NO_TOKEN as NO_TOKEN
from engine.request import SamplingParams, TokenLogprobs


class Tier(enum.IntEnum):
    """Where blocks of the KV cache lie. A smaller value is a faster tier."""

    GPU = 0  # the memory of the device that computes, whatever it is
    HOST = 1
    DISK = 2  # no plan copies to or from it: the host tier's slots are read and written by threads of the disk tier


class Place(NamedTuple):
    """A place for one block: a KV block of the device, or a slot of a lower tier."""

    tier: Tier
    number: int


class BlockCopy(NamedTuple):
    """Tells the runner to copy the content of a block, in all pools, from one place to another.

    The copies of a plan have the result of running one after the other, after the slices of earlier plans and before its own.

    A move is a copy between two tiers. It may end later, and the runner reports its arrival. A move out of the GPU nevertheless
    copies the content that its block has at this place in the order. Until a move into the GPU has arrived, no slice of this plan
    or of a later one reads or writes its block, and nothing overwrites its source.
    """

    src: Place
    dst: Place

    @property
    def is_move(self) -> bool:
        return self.src.tier is not self.dst.tier


class Arrival(NamedTuple):
    """Reports the end of a move. If it failed (`ok` is false), the content of `dst` is undefined."""

    dst: Place
    ok: bool


def gpu(block: int) -> Place:
    return Place(Tier.GPU, block)


def host(slot: int) -> Place:
    return Place(Tier.HOST, slot)


class AdmittedRow(msgspec.Struct, gc=False):
    """Describes a request that takes a batch row. Input tokens at positions below len(tokens) come from `tokens`.

    Input tokens at later positions are the tokens that the row has sampled since.
    """

    row: int
    tokens: Sequence[int]  # prompt, then the outputs so far; an int32 array when the scheduler made the plan
    num_prompt: int
    blocks: list[int]  # block table at the admission, in position order
    params: SamplingParams
    seed: int


class GrownRow(NamedTuple):
    """Tells the runner to append `blocks` to the block table of `row`. `length` is the table's length before."""

    row: int
    length: int
    blocks: list[int]


class SpilledContext(NamedTuple):
    """Where the KV of a row lies whose context is larger than the GPU's cache. Blocks in the host come before those in the GPU.

    The row has no other block table. Every block in the host is full and has arrived there. The others have room for all
    positions of the plan's slice.
    """

    slots: list[int]  # of the host
    blocks: list[int]  # of the GPU


class StepPlan(msgspec.Struct, gc=False):
    """Describes what the runner does in one step. `rows`, `starts` and `nums` are parallel lists with one entry per slice.

    The first `num_decodes` slices have one token each, the latest token of their row. The other slices are chunks of
    prompts, or of prompts and outputs that are computed again after a preemption. A row occurs at most once.

    A plan may have copies and no slices. If `spilled` is set, the plan has one slice, of the row whose context that is.
    """

    step: int
    rows: list[int] = []
    starts: list[int] = []
    nums: list[int] = []
    num_decodes: int = 0
    samples: list[int] = []  # indices of the slices that sample, ascending
    admitted: list[AdmittedRow] = []
    grown: list[GrownRow] = []
    copies: list[BlockCopy] = []
    spilled: SpilledContext | None = None

    @property
    def num_tokens(self) -> int:
        return sum(self.nums)


class StepResult(msgspec.Struct, gc=False):
    """The outcome of one step. `tokens[i]` was sampled by slice `plan.samples[i]`, or is NO_TOKEN if that row's logits were
    not finite, or NO_CHOICE if the request's own restrictions exclude every token. After either, the runner continues the row
    with token id 0 until the scheduler ends the request.

    `logprobs` and `prompt_logprobs` are keyed by slice index. `prompt_logprobs[s]` has one entry for each position in
    start+1 .. start+num of slice s that lies in the prompt.
    """

    step: int
    tokens: list[int]
    logprobs: dict[int, TokenLogprobs] = {}
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    idle_seconds: float = 0.0  # device idle time between the end of the previous step and the start of this one
    device_seconds: float = 0.0  # time that the device spent on this step, without idle time before it; 0: too short to measure


class PendingStep(Protocol):
    """A submitted step. `result` waits for the device and may be called once."""

    def result(self) -> StepResult: ...


class Runner(Protocol):
    """Executes plans in the order in which they are submitted. `submit` may return before the device has finished."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def num_compiled(self) -> int:
        """Kernels that were compiled in this process since it started."""
        ...

    def submit(self, plan: StepPlan) -> PendingStep: ...

    def poll(self, seconds: float = 0.0) -> list[Arrival]:
        """Return the moves that have ended since the last call. If there is none, wait for one, at most `seconds`.

        The call never waits if no move is under way. The core lets it wait only while no step could run.
        """
        ...

    def prepare(self) -> bool:
        """Do one short piece of preparation for later steps, such as capturing a graph. Called only while there is no
        work. Returns False when nothing is left to prepare."""
        ...

    def close(self) -> None: ...


class PoolKind(msgspec.Struct, frozen=True):
    """What a pool of the KV cache keeps of a sequence, and what of it the next token needs.

    token: a record for each token, all of which are needed. window: a record for each token, of which the latest `window` are
    needed. state: one record for all tokens so far. A slice reads it in the block of the token before, and writes it in the block
    of its last token, so a full block holds the state at its end if a slice ended there.
    """

    name: Literal["token", "window", "state"]
    window: int = 0


PER_TOKEN = (PoolKind("token"),)


class KVFormat(msgspec.Struct, frozen=True):
    """What decides on the content of a KV block besides its tokens. Engines of other formats cannot use it."""

    model: str = ""  # fingerprint of the checkpoint, and of what else decides on the numbers that the model computes
    pools: str = ""  # name, shape and type of each pool of each layer
    kinds: tuple[PoolKind, ...] = PER_TOKEN  # of the pools


class HostSlots(Protocol):
    """The memory of the host tier. The runner moves blocks to and from its slots, and the disk tier reads and writes them."""

    @property
    def num_slots(self) -> int: ...

    @property
    def record_bytes(self) -> int:
        """Bytes of a block in all its pools."""
        ...

    def record(self, slot: int) -> memoryview:
        """Return the bytes of the block in a slot."""
        ...


class BuiltRunner(NamedTuple):
    """The return value of a runner module's `build(config)`."""

    runner: Runner
    config: EngineConfig  # resolved: every automatic choice is made
    limits: ModelLimits
    device: str  # description for people
    kv: KVFormat = KVFormat()
    host: HostSlots | None = None  # None: there is no host tier
