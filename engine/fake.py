"""FakeRunner: a peer of the real runner that computes nothing, for tests and for load tests of everything above it.

A row's next token is a hash of all its earlier tokens and, unless the row is greedy, of its seed. The token therefore
depends only on the request and never on how the request was scheduled. The simulated device runs one step after the other
and takes the time that FakeConfig says, by the real clock or by a simulated one.

With `verify`, FakeRunner also simulates the content of the blocks (`fake_blocks.py`), and raises InternalError if a step would
attend to anything but its own prefix.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Sequence

import msgspec
import xxhash

from engine.config import EngineConfig, FakeConfig, ModelLimits, fit_cache, host_slots, host_stride, resolve
from engine.errors import ConfigError, InternalError
from engine.fake_blocks import MASK, SimulatedBlocks, SliceOfRow, mix, record_bytes
from engine.fake_device import SimulatedDevice, SimulatedMoves
from engine.kvcache.host_memory import HostMemory
from engine.kvcache.kinds import HitRule
from engine.models.families import read_spec
from engine.plan import (
    NO_CHOICE,
    NO_TOKEN,
    PER_TOKEN,
    AdmittedRow,
    Arrival,
    BuiltRunner,
    KVFormat,
    PendingStep,
    PoolKind,
    StepPlan,
    StepResult,
)
from engine.request import SamplingParams, TokenLogprobs
from engine.scheduler.cost_file import load_costs
from engine.scheduler.cost_table import CostTable
from engine.startup import StartupClock

MakeDevice = Callable[[FakeConfig, CostTable | None], SimulatedDevice]
MAX_BLOCKS = 1 << 24  # the lists of more blocks would fill the memory of a small machine


class _Row:
    """Holds the state that a device would keep for a batch row. `chain` is a hash of all of `tokens`."""

    __slots__ = ("allowed", "blocks", "chain", "masked", "num_prompt", "params", "salt", "tokens")

    def __init__(self, admitted: AdmittedRow, eos: tuple[int, ...]) -> None:
        self.tokens = array("i", admitted.tokens)
        self.num_prompt = admitted.num_prompt
        self.blocks = admitted.blocks.copy()
        self.params = admitted.params
        self.salt = 0 if admitted.params.greedy else admitted.seed * 0x9E3779B97F4A7C15 & MASK
        self.masked = frozenset((*admitted.params.stop_token_ids, *admitted.params.end_ids(eos)))
        allowed = admitted.params.allowed_token_ids
        self.allowed = None if allowed is None else frozenset(allowed)
        self.chain = xxhash.xxh3_64_intdigest(self.tokens[: self.num_prompt].tobytes())
        for token in self.tokens[self.num_prompt :]:
            self.chain = mix(self.chain, token)

    def sample(self, vocab_size: int) -> int:
        """Return the row's next token, or NO_CHOICE. The caller must then pass the token to `append`."""
        token = mix(self.chain, self.salt) % vocab_size
        if not self.params.is_restricted:
            return token
        excluded = self._excluded()
        for candidate in itertools.chain(range(token, vocab_size), range(token)):
            if candidate not in excluded and (self.allowed is None or candidate in self.allowed):
                return candidate
        return NO_CHOICE

    def _excluded(self) -> set[int]:
        """Return the tokens that min_tokens and bad_words exclude as the next token."""
        num_outputs = len(self.tokens) - self.num_prompt
        excluded = set(self.masked) if num_outputs < self.params.min_tokens else set()
        for *before, last in self.params.bad_words:
            if len(before) <= num_outputs and self.tokens[len(self.tokens) - len(before) :].tolist() == before:
                excluded.add(last)
        return excluded

    def append(self, token: int) -> None:
        self.tokens.append(token)
        self.chain = mix(self.chain, token)


class FakeRunner:
    """`device` says how long steps take, by default what `simulated` says by the real clock.

    If `only_token` is given, every row samples that token. Then nothing of the rows is kept, checked or hashed, which takes too
    long in a simulation of millions of tokens, and log-probabilities are not reported.
    """

    def __init__(
        self,
        limits: ModelLimits,
        *,
        num_blocks: int,
        block_size: int,
        simulated: FakeConfig | None = None,
        verify: bool = False,
        device: SimulatedDevice | None = None,
        only_token: int | None = None,
        host: HostMemory | None = None,
        kinds: tuple[PoolKind, ...] = PER_TOKEN,
    ) -> None:
        self._limits = limits
        self._num_blocks = num_blocks
        self._simulated = simulated or FakeConfig()
        self._rows: dict[int, _Row] = {}
        self._blocks = SimulatedBlocks(num_blocks, block_size, host, kinds) if verify else None
        self._device = device or SimulatedDevice(self._simulated)
        self._moves = SimulatedMoves(self._simulated, self._device)
        self._only_token = only_token

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def num_compiled(self) -> int:
        return 0

    def submit(self, plan: StepPlan) -> PendingStep:
        self._moves.submit(plan)
        if self._only_token is not None:
            seconds = self._seconds(plan)
            result = StepResult(plan.step, [self._only_token] * len(plan.samples), device_seconds=seconds)
            return FakeStep(result, self._device, self._device.submit(seconds))
        self._update_rows(plan)
        if self._blocks is not None:
            self._blocks.run(plan, self._slices(plan))
        seconds = self._seconds(plan)
        result = StepResult(plan.step, [], {}, {}, device_seconds=seconds)
        for index in self._with_prompt_logprobs(plan):
            result.prompt_logprobs[index] = self._prompt_logprobs(plan, index)
        for index in plan.samples:
            self._sample(plan, index, result)
        return FakeStep(result, self._device, self._device.submit(seconds))

    def poll(self, seconds: float = 0.0) -> list[Arrival]:
        arrivals = self._moves.poll(seconds)
        if self._blocks is not None:
            for arrival in arrivals:
                self._blocks.arrive(arrival)
        return arrivals

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

    def _slices(self, plan: StepPlan) -> list[SliceOfRow]:
        slices = zip(map(self._rows.__getitem__, plan.rows), plan.starts, plan.nums, strict=True)
        if plan.spilled is not None:
            slots, blocks = plan.spilled
            return [SliceOfRow(row.tokens, blocks, start, start + num, slots) for row, start, num in slices]
        return [SliceOfRow(row.tokens, row.blocks, start, start + num, []) for row, start, num in slices]

    def _seconds(self, plan: StepPlan) -> float:
        """Return how long a step takes. If its context lies in the host in part, that is read first."""
        num_read = 0 if plan.spilled is None else len(plan.spilled.slots)
        return self._device.seconds(plan) + num_read * self._moves.block_seconds

    def _sample(self, plan: StepPlan, index: int, result: StepResult) -> None:
        row = self._rows[plan.rows[index]]
        if plan.starts[index] + plan.nums[index] != len(row.tokens):
            raise InternalError(f"row {plan.rows[index]} samples after position {plan.starts[index]} of {len(row.tokens)}")
        token = row.sample(self._limits.vocab_size)
        if token == NO_CHOICE or token == self._simulated.nan_token:
            row.append(0)
            result.tokens.append(NO_CHOICE if token == NO_CHOICE else NO_TOKEN)
            return
        row.append(token)
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
        """Return made-up log-probabilities of `token`. Its rank is 1: the fake model always samples its most probable token."""
        num = min(num, self._limits.vocab_size)
        top = [(token + i) % self._limits.vocab_size for i in range(num)]
        return TokenLogprobs(token, -0.5, 1, top, [-0.5 - i for i in range(num)])


class FakeStep:
    """A submitted step that `device` ends at the time `done_at`."""

    __slots__ = ("_device", "_done_at", "_result")

    def __init__(self, result: StepResult, device: SimulatedDevice, done_at: float) -> None:
        self._result = result
        self._device = device
        self._done_at = done_at

    def result(self) -> StepResult:
        self._device.wait(self._done_at)
        return self._result


def build(config: EngineConfig, clock: StartupClock | None = None) -> BuiltRunner:
    """Build a FakeRunner with the limits of the model in the folder `config.model`. `debug_checks` turns `verify` on."""
    limits = read_spec(config.model).limits()
    if clock is not None:
        clock.end("config")
    return build_fake(config, limits)


def build_fake(
    config: EngineConfig,
    limits: ModelLimits,
    *,
    make_device: MakeDevice = SimulatedDevice,
    only_token: int | None = None,
    kinds: tuple[PoolKind, ...] = PER_TOKEN,
) -> BuiltRunner:
    """Build a FakeRunner with the given limits, without a checkpoint folder. `make_device` makes a device from the config.

    `kinds` are those of the simulated model's pools.
    """
    # The simulated device is asynchronous even if `device` is "cpu".
    config = msgspec.structs.replace(config, overlap=config.overlap is not False)
    resolved = resolve(config, limits, has_cuda=config.device == "cuda")
    num_blocks = config.cache.num_blocks or config.fake.num_blocks
    if num_blocks > MAX_BLOCKS:
        raise ConfigError(
            f"cache.num_blocks is {num_blocks}: the fake runner has at most {MAX_BLOCKS} blocks", param="cache.num_blocks"
        )
    can_spill = HitRule(kinds, config.cache.block_size).is_plain
    spill_bytes = config.fake.block_bytes if can_spill else None
    resolved = fit_cache(resolved, num_blocks, asked=config.max_model_len, spill_bytes=spill_bytes)
    costs = config.fake.cost_file and load_costs(config.fake.cost_file, setting="fake.cost_file")
    host = _host_memory(resolved, kinds)
    runner = FakeRunner(
        limits,
        num_blocks=num_blocks,
        block_size=config.cache.block_size,
        simulated=config.fake,
        verify=config.debug_checks,
        device=make_device(config.fake, costs.table if costs else None),
        only_token=only_token,
        host=host,
        kinds=kinds,
    )
    device = f"fake {costs.key.device}" if costs else "fake device"
    return BuiltRunner(runner, resolved, limits, device, KVFormat("fake", "hashes of prefixes", kinds), host)


def _host_memory(config: EngineConfig, kinds: tuple[PoolKind, ...]) -> HostMemory | None:
    """Return the memory of the host tier. It has as many slots as there would be for blocks of `fake.block_bytes`.

    Blocks whose content is simulated take fewer bytes, and others none, except that records on disk have `fake.block_bytes`.
    """
    slots = host_slots(config, config.fake.block_bytes)
    if not slots:
        return None
    if config.debug_checks:
        size = record_bytes(config.cache.block_size, kinds)
    else:
        size = config.fake.block_bytes if config.cache.disk_tier_folder else 1
    return HostMemory(slots, size, host_stride(config, size))


def expected_tokens(prompt: Sequence[int], num: int, params: SamplingParams, seed: int, limits: ModelLimits) -> list[int]:
    """Return the first `num` tokens that every FakeRunner of this model generates for a request, however it is scheduled."""
    row = _Row(AdmittedRow(0, prompt, len(prompt), [], params, seed), limits.eos_token_ids)
    for _ in range(num):
        row.append(row.sample(limits.vocab_size))
    return row.tokens[len(prompt) :].tolist()
