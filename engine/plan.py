"""All that passes between scheduler and runner: a StepPlan goes down, a StepResult comes back.

A running request owns a batch row for as long as it runs. The runner keeps the row's state on the device (block table,
latest token, sampling state), so a plan says only what changed: rows admitted, block tables grown, and for each slice
which positions to run. A decode step of 256 requests therefore carries three short integer lists and next to nothing else.

    admitted    row 7 := tokens, blocks, params              once per admission (again after a preemption)
    grown       row 7 += [block 41]                          once per block_size tokens
    slices      row 7: positions [start, start + num)        every step
    samples     which slices' last position yields a token
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import msgspec

from engine.config import EngineConfig, ModelLimits
from engine.request import SamplingParams, TokenLogprobs

NO_TOKEN = -1  # in StepResult.tokens: the row's logits held NaN or infinity, so no token was sampled


class BlockCopy(NamedTuple):
    """Copy every pool of block `src` to block `dst`, before anything else of the step runs."""

    src: int
    dst: int


class AdmittedRow(msgspec.Struct, gc=False):
    """A request takes a row. Input tokens at positions below len(tokens) are these; later ones are what the row sampled."""

    row: int
    tokens: list[int]  # prompt, then outputs so far
    num_prompt: int
    blocks: list[int]  # block table so far, in position order
    params: SamplingParams
    seed: int


class GrownRow(NamedTuple):
    """Append `blocks` to the row's block table, whose length before was `length`."""

    row: int
    length: int
    blocks: list[int]


class StepPlan(msgspec.Struct, gc=False):
    """What to run in one step. `rows`, `starts` and `nums` are parallel, one entry a slice.

    Slices are ordered: the first `num_decodes` are of one token, which is the last known of its row; the rest are
    chunks of prompts (or of a prompt and outputs being recomputed). A row occurs at most once.
    """

    step: int
    rows: list[int]
    starts: list[int]
    nums: list[int]
    num_decodes: int
    samples: list[int]  # indices of the slices that sample, ascending
    admitted: list[AdmittedRow]
    grown: list[GrownRow]
    copies: list[BlockCopy]

    @property
    def num_tokens(self) -> int:
        return sum(self.nums)


class StepResult(msgspec.Struct, gc=False):
    """What came out. `tokens[i]` was sampled by slice `plan.samples[i]`; the maps are keyed by slice index.

    `prompt_logprobs[s]` has one entry for each position start+1 .. start+num of slice s that lies in the prompt.
    """

    step: int
    tokens: list[int]
    logprobs: dict[int, TokenLogprobs] = {}
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    idle_seconds: float = 0.0  # the device had none of ours to do before this step, and after the one before


class PendingStep(Protocol):
    """A submitted step; `result` waits for the device and may be called once."""

    def result(self) -> StepResult: ...


class Runner(Protocol):
    """Executes plans, in the order they are submitted. `submit` may return before the device is done."""

    @property
    def num_blocks(self) -> int: ...

    def submit(self, plan: StepPlan) -> PendingStep: ...

    def prepare(self) -> bool:
        """Called while there is nothing to run: do a short piece of what later steps will want. False: nothing is left."""
        ...

    def close(self) -> None: ...


class BuiltRunner(NamedTuple):
    """What a runner module's `build(config)` returns: the runner, the config with every choice made, the model's limits."""

    runner: Runner
    config: EngineConfig
    limits: ModelLimits
    device: str  # in words, for people
