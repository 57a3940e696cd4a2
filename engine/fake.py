"""FakeRunner: a peer of the real runner that computes nothing, for tests and for load tests of everything above it.

A row's next token is a hash of all tokens before it and, unless it is greedy, of the row's seed, so it depends on what a
request is and never on how it was scheduled. A simulated device takes the time that `FakeConfig` says, one step after the
other.

With `verify` it also simulates what the blocks hold: each slot remembers the prefix whose KV was written there, and a
step that would attend to anything else raises. Wrong block tables, missing copies, shared blocks written to and wrong
positions all end there.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence

import msgspec
import xxhash

from engine.config import EngineConfig, FakeConfig, ModelLimits, fit_cache, resolve
from engine.errors import InternalError
from engine.models.spec import ModelSpec
from engine.plan import AdmittedRow, BlockCopy, BuiltRunner, PendingStep, StepPlan, StepResult
from engine.request import SamplingParams, TokenLogprobs
from engine.startup import StartupClock

_MASK = (1 << 64) - 1


class _Row:
    """The state a device keeps of a row. `chain` hashes all of `tokens`."""

    __slots__ = ("blocks", "chain", "masked", "num_prompt", "params", "salt", "tokens")

    def __init__(self, admitted: AdmittedRow, eos: tuple[int, ...]) -> None:
        self.tokens = array("i", admitted.tokens)
        self.num_prompt = admitted.num_prompt
        self.blocks = admitted.blocks.copy()
        self.params = admitted.params
        self.salt = 0 if admitted.params.greedy else admitted.seed * 0x9E3779B97F4A7C15 & _MASK
        self.masked = frozenset(admitted.params.stop_token_ids) | frozenset(() if admitted.params.ignore_eos else eos)
        self.chain = xxhash.xxh3_64_intdigest(self.tokens[: self.num_prompt].tobytes())
        for token in self.tokens[self.num_prompt :]:
            self.chain = _mix(self.chain, token)

    def sample(self, vocab_size: int) -> int:
        """Choose the next token and append it."""
        token = _mix(self.chain, self.salt) % vocab_size
        if len(self.tokens) - self.num_prompt < self.params.min_tokens:
            for _ in range(len(self.masked)):
                if token not in self.masked:
                    break
                token = (token + 1) % vocab_size
        self.tokens.append(token)
        self.chain = _mix(self.chain, token)
        return token


class FakeRunner:
    def __init__(
        self, limits: ModelLimits, *, num_blocks: int, block_size: int, times: FakeConfig | None = None, verify: bool = False
    ) -> None:
        self._limits = limits
        self._num_blocks = num_blocks
        self._times = times or FakeConfig()
        self._rows: dict[int, _Row] = {}
        self._blocks = SimulatedBlocks(num_blocks, block_size) if verify else None
        self._device_free_at = 0.0

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    def submit(self, plan: StepPlan) -> PendingStep:
        self._update_rows(plan)
        if self._blocks is not None:
            self._blocks.run(plan, self._rows)
        result = StepResult(plan.step, [], {}, {})
        for index in self._with_prompt_logprobs(plan):
            result.prompt_logprobs[index] = self._prompt_logprobs(plan, index)
        for index in plan.samples:
            self._sample(plan, index, result)
        return FakeStep(result, self._finish_time(plan))

    def prepare(self) -> bool:
        return False

    def close(self) -> None:
        self._rows.clear()

    def _update_rows(self, plan: StepPlan) -> None:
        for admitted in plan.admitted:
            self._rows[admitted.row] = _Row(admitted, self._limits.eos_token_ids)
        for grown in plan.grown:
            row = self._rows[grown.row]
            if len(row.blocks) != grown.length:
                raise InternalError(f"row {grown.row} has {len(row.blocks)} blocks, the plan says {grown.length}")
            row.blocks += grown.blocks

    def _sample(self, plan: StepPlan, index: int, result: StepResult) -> None:
        row = self._rows[plan.rows[index]]
        if plan.starts[index] + plan.nums[index] != len(row.tokens):
            raise InternalError(f"row {plan.rows[index]} samples after position {plan.starts[index]} of {len(row.tokens)}")
        token = row.sample(self._limits.vocab_size)
        result.tokens.append(token)
        if row.params.logprobs is not None:
            result.logprobs[index] = self._logprobs(token, row.params.logprobs)

    def _with_prompt_logprobs(self, plan: StepPlan) -> list[int]:
        rows = self._rows
        return [
            index
            for index in range(plan.num_decodes, len(plan.rows))
            if rows[plan.rows[index]].params.prompt_logprobs is not None
        ]

    def _prompt_logprobs(self, plan: StepPlan, index: int) -> list[TokenLogprobs]:
        row = self._rows[plan.rows[index]]
        first = plan.starts[index] + 1
        tokens = row.tokens[first : min(first + plan.nums[index], row.num_prompt)]
        return [self._logprobs(token, row.params.prompt_logprobs or 0) for token in tokens]

    def _logprobs(self, token: int, num: int) -> TokenLogprobs:
        """The token itself is always the likeliest."""
        num = min(num, self._limits.vocab_size)
        top = [(token + i) % self._limits.vocab_size for i in range(num)]
        return TokenLogprobs(token, -0.5, 1, top, [-0.5 - i for i in range(num)])

    def _finish_time(self, plan: StepPlan) -> float:
        times = self._times
        seconds = times.step_ms / 1e3 + times.token_us / 1e6 * plan.num_tokens
        if seconds == 0.0:
            return 0.0
        self._device_free_at = max(time.monotonic(), self._device_free_at) + seconds
        return self._device_free_at


class FakeStep:
    __slots__ = ("_done_at", "_result")

    def __init__(self, result: StepResult, done_at: float) -> None:
        self._result = result
        self._done_at = done_at

    def result(self) -> StepResult:
        if self._done_at:
            wait = self._done_at - time.monotonic()
            if wait > 0:
                time.sleep(wait)
        return self._result


class SimulatedBlocks:
    """What each slot holds: a hash of the tokens up to and including its own, or None."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._slots: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]

    def run(self, plan: StepPlan, rows: dict[int, _Row]) -> None:
        """Copies first, then every slice writes, then every slice attends to all that is before its end."""
        for copy in plan.copies:
            self._copy(copy)
        if len(set(plan.rows)) != len(plan.rows):
            raise InternalError("a row occurs twice in a step")
        slices = [(rows[row], start, start + num) for row, start, num in zip(plan.rows, plan.starts, plan.nums, strict=True)]
        prefixes = [_prefixes(row.tokens[:end]) for row, _, end in slices]
        for (row, start, end), prefix in zip(slices, prefixes, strict=True):
            if len(prefix) != end or end > len(row.blocks) * self._block_size:
                raise InternalError(f"positions {start} to {end} of {len(row.tokens)} tokens in {len(row.blocks)} blocks")
            for position in range(start, end):
                self._slots[row.blocks[position // self._block_size]][position % self._block_size] = prefix[position]
        for (row, _, end), prefix in zip(slices, prefixes, strict=True):
            for position in range(end):
                block = row.blocks[position // self._block_size]
                if self._slots[block][position % self._block_size] != prefix[position]:
                    raise InternalError(f"block {block} does not hold position {position} of the row that reads it")

    def _copy(self, copy: BlockCopy) -> None:
        self._slots[copy.dst] = self._slots[copy.src].copy()


def build(config: EngineConfig, clock: StartupClock | None = None) -> BuiltRunner:
    """A FakeRunner with the limits of the model in `config.model`; it verifies the blocks where `debug_checks` is on."""
    limits = ModelSpec.from_folder(config.model).limits()
    if clock is not None:
        clock.end("config")
    return build_fake(config, limits)


def build_fake(config: EngineConfig, limits: ModelLimits) -> BuiltRunner:
    """The same for limits that come from no checkpoint."""
    # The simulated device is asynchronous, whatever it is called.
    config = msgspec.structs.replace(config, overlap=config.overlap is not False)
    resolved = resolve(config, limits, has_cuda=config.device == "cuda")
    num_blocks = config.cache.num_blocks or config.fake.num_blocks
    resolved = fit_cache(resolved, num_blocks, asked=config.max_model_len)
    runner = FakeRunner(
        limits, num_blocks=num_blocks, block_size=config.cache.block_size, times=config.fake, verify=config.debug_checks
    )
    return BuiltRunner(runner, resolved, limits, "fake device")


def expected_tokens(prompt: Sequence[int], num: int, params: SamplingParams, seed: int, limits: ModelLimits) -> list[int]:
    """The first `num` tokens that any FakeRunner of this model gives a request, however it is scheduled."""
    row = _Row(AdmittedRow(0, prompt, len(prompt), [], params, seed), limits.eos_token_ids)
    return [row.sample(limits.vocab_size) for _ in range(num)]


def _mix(state: int, value: int) -> int:
    state = (state ^ value) * 0xBF58476D1CE4E5B9 & _MASK
    return state ^ state >> 29


def _prefixes(tokens: Sequence[int]) -> list[int]:
    """A hash of tokens[: i + 1] for each i."""
    state, out = 1, []
    for token in tokens:
        state = _mix(state + 1, token)
        out.append(state)
    return out
