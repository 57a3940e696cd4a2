"""Implements `tidegate bench cost`: measures what steps of a model cost on this machine, and writes them as a cost file.

Real steps run one after the other through the real scheduler and runner: for each number of rows that a step of decodes may have,
prompts that fill the rows, then decodes alone, then a long prompt beside them, in chunks of all sizes. Then a few rows with long
contexts, since only those tell what a token of KV costs. A first round warms up and does not count. The costs are fitted to four
fifths of the steps, and their error is that on the other fifth.
"""

from __future__ import annotations

import importlib
import random
import time
from array import array
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console

from engine.config import BatchingConfig, SchedulerConfig
from engine.core import RUNNERS
from engine.errors import ConfigError
from engine.plan import BuiltRunner
from engine.request import Request, SamplingParams
from engine.scheduler.cost_file import cost_key, save_costs
from engine.scheduler.cost_table import CostTable, row_sizes, token_knots
from engine.scheduler.limits import StepLimits, StepShape
from engine.scheduler.scheduler import Scheduler
from engine.scheduler.step_cost import StepCost
from server.bench import lines
from server.bench.lines import CostLine
from server.bench.outcomes import percentile
from server.settings import Settings

MOST_ERROR = 0.25  # of a file that is written; a server does not trust costs that are further off
ROUNDS = 2
DECODE_STEPS = 8  # steps of decodes alone for each number of rows
CHUNK_STEPS = 16  # steps of a long prompt beside them
PASSES = 8  # over the steps, when the costs are fitted to them
SHORTEST, LONGEST = 8, 512  # tokens of the prompts that fill the rows
LONG_STEPS = 4  # the long prompt has so many steps of the largest size
LONG_ROWS = (64, 8, 1)  # numbers of rows with long contexts
CONTEXT_STEPS = 32  # the contexts of these rows together have so many steps of the largest size
HELD_OUT = 5  # one of so many steps is held out
SEED = 7


class Observation(NamedTuple):
    shape: StepShape
    seconds: float


class Fitted(NamedTuple):
    table: CostTable
    held_out: int
    error: float  # median relative error on the steps held out
    error_p90: float


class _Bench:
    """Runs steps, and remembers what they took."""

    def __init__(self, built: BuiltRunner, rng: random.Random) -> None:
        config = built.config
        self._runner, self._limits, self._rng = built.runner, built.limits, rng
        self._scheduler = Scheduler(config, built.runner.num_blocks)
        self._rows = config.scheduler.max_num_seqs
        self._tokens = config.scheduler.max_step_tokens or self._rows
        self._context = config.max_model_len or built.limits.max_model_len
        self._room = built.runner.num_blocks * config.cache.block_size // 2  # so that no request is preempted
        self._num_requests = 0
        self.observations: list[Observation] = []

    def round(self) -> Iterator[int]:
        """Measure steps of each number of rows. Yields the number before it is measured."""
        knots = token_knots(self._tokens)
        self._rng.shuffle(knots)
        budgets = cycle(knots)
        for rows in row_sizes(self._rows):
            yield rows
            self._measure(rows, budgets)
        for rows in LONG_ROWS:
            if rows <= self._rows:
                yield rows
                self._measure_long(rows, budgets)

    def _measure(self, rows: int, budgets: Iterator[int]) -> None:
        longest = max(1, min(LONGEST, self._context // 4, self._room // rows - DECODE_STEPS - CHUNK_STEPS))
        shortest = min(SHORTEST, longest)
        names = [self._add(round(shortest * (longest / shortest) ** self._rng.random())) for _ in range(rows)]
        while self._scheduler.has_prompts:
            self._step(next(budgets))
        for _ in range(DECODE_STEPS):
            self._step(self._tokens)
        if rows < self._rows:
            names.append(self._add(min(self._context // 2, self._room // 2, LONG_STEPS * self._tokens)))
            for _ in range(CHUNK_STEPS):
                if self._scheduler.has_prompts:
                    self._step(next(budgets))
        for name in names:
            self._scheduler.abort(name)

    def _measure_long(self, rows: int, budgets: Iterator[int]) -> None:
        """Measure prompts of one length in chunks of all sizes, each behind more context, and then their decodes."""
        length = min(CONTEXT_STEPS * self._tokens // rows, self._context // 2, self._room // rows - DECODE_STEPS)
        if length <= LONGEST:
            return
        names = [self._add(length) for _ in range(rows)]
        while self._scheduler.has_prompts:
            self._step(next(budgets))
        for _ in range(DECODE_STEPS):
            self._step(self._tokens)
        for name in names:
            self._scheduler.abort(name)

    def _add(self, num_prompt: int) -> str:
        self._num_requests += 1
        request = Request(
            f"cost-{self._num_requests}",
            array("i", (self._rng.randrange(self._limits.vocab_size) for _ in range(num_prompt))),
            SamplingParams(temperature=0.0, max_tokens=self._context, ignore_eos=True),
            num_prompt=num_prompt,
            seed=0,
            max_model_len=self._context,
        )
        self._scheduler.add(request)
        return request.request_id

    def _step(self, prompt_tokens: int) -> None:
        tokens = min(self._tokens, self._scheduler.load().decodes + prompt_tokens)
        plan = self._scheduler.schedule(StepLimits(tokens, self._rows, tokens))
        if plan is None:
            return  # every request has reached the end of the context
        result = self._runner.submit(plan).result()
        self.observations.append(Observation(StepShape.of(plan), result.device_seconds))
        self._scheduler.commit(plan, result)


def run(settings: Settings, *, out: Path, rounds: int = ROUNDS, record: Path | None = None) -> CostLine:
    """Measure the model of `settings`, and write the file `out`. A summary goes to stderr, and a JSON line to stdout.

    Raises ConfigError, and writes nothing, if the costs are off by more than MOST_ERROR.
    """
    if rounds < 1:
        raise ConfigError(f"rounds is {rounds}: it must be at least 1", param="rounds")
    if not out.parent.is_dir():
        raise ConfigError(f"out is {str(out)!r}, and there is no folder {str(out.parent)!r}: name a file in one", param="out")
    lines.check_record(record)
    began = time.perf_counter()
    config = settings.engine_config()
    cache = msgspec.structs.replace(config.cache, prefix_caching=False, host_tier_bytes=0)
    config = msgspec.structs.replace(config, cache=cache, overlap=False, offline=False, batching=BatchingConfig())
    built: BuiltRunner = importlib.import_module(RUNNERS[config.runner]).build(config)
    console = Console(stderr=True)
    try:
        found = measure(built, rounds, console)
    finally:
        built.runner.close()
    fitted = fit(built.config.scheduler, found)
    key = cost_key(built.config, built.device)
    if fitted.error > MOST_ERROR:
        raise ConfigError(
            f"out is not written: on steps that they were not fitted to, the costs are off by {fitted.error:.0%} at the median, "
            f"and may be off by {MOST_ERROR:.0%}: measure while nothing else uses {key.device}, or more rounds",
            param="rounds",
        )
    line = CostLine(
        date=lines.today(),
        commit=lines.commit(),
        device=key.device,
        model=key.model,
        precision=key.precision,
        steps=len(found),
        held_out=fitted.held_out,
        error=round(fitted.error, 4),
        error_p90=round(fitted.error_p90, 4),
        seconds=round(time.perf_counter() - began, 1),
        file=str(out),
        command=lines.command(),
    )
    save_costs(out, key, source_of(line), fitted.table)
    _say(
        console,
        f"{out}: {line.steps} steps; error on {line.held_out} of them {line.error:.1%} at the median, P90 {line.error_p90:.1%}",
    )
    lines.write(line, record)
    return line


def measure(built: BuiltRunner, rounds: int, console: Console) -> list[Observation]:
    """Run a round that warms up, and then `rounds` that count."""
    while built.runner.prepare():
        pass
    bench = _Bench(built, random.Random(SEED))
    for number in range(rounds + 1):
        name = f"round {number}" if number else "warm-up"
        for rows in bench.round():
            _say(console, f"{name}: {rows} rows")
        if not number:
            bench.observations.clear()
    return bench.observations


def fit(scheduler: SchedulerConfig, found: list[Observation]) -> Fitted:
    """Fit a table to four fifths of the steps, and compare it with the rest. `scheduler` has the sizes of the table."""
    cost = StepCost.of_size(scheduler.max_num_seqs, scheduler.max_step_tokens or scheduler.max_num_seqs)
    rng = random.Random(SEED)
    shuffled = rng.sample(found, len(found))
    held_out, rest = shuffled[::HELD_OUT], [each for index, each in enumerate(shuffled) if index % HELD_OUT]
    for _ in range(PASSES):
        for shape, seconds in rng.sample(rest, len(rest)):
            cost.observe(shape, seconds)
    errors = [abs(cost.predict(shape) / seconds - 1) for shape, seconds in held_out if seconds > 0]
    if not errors:
        raise ConfigError("the steps took no time that could be measured: name a model and a device that compute", param="model")
    return Fitted(cost.table, len(held_out), percentile(errors, 50), percentile(errors, 90))


def source_of(line: CostLine) -> str:
    return (
        f"measured by `{line.command}` at {line.commit} on {line.date}: {line.steps} steps, median error {line.error:.1%} on "
        f"{line.held_out} steps that were held out"
    )


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
