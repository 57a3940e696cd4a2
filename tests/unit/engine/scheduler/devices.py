"""Devices made of numbers, for tests of what learns from measured steps: their steps take what a CostTable says, with noise."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from engine.scheduler.cost_table import CostTable
from engine.scheduler.limits import StepShape
from engine.scheduler.step_cost import StepCost

# An H200 with llama-8b, in round numbers.
H200 = CostTable(
    [1, 64, 128, 192, 256],
    [4.0e-3, 4.4e-3, 4.9e-3, 5.5e-3, 6.7e-3],
    [16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384],
    [4.3e-3, 4.6e-3, 5.1e-3, 6.8e-3, 11.5e-3, 22.6e-3, 44.8e-3, 90e-3, 180e-3, 360e-3],
    3.5e-8,
    8.5e-10,
    8.5e-10,
)
# A CPU: a step of 512 prompt tokens takes 300 ms, and weights are read in 20 ms.
CPU = CostTable([1, 2, 4, 8, 16, 64], [20e-3, 21e-3, 23e-3, 26e-3, 32e-3, 70e-3], [16, 512], [29e-3, 300e-3], 1e-6, 1e-8, 1e-8)
# Two shared cores: the smallest step takes nearly as long as the class `interactive` promises between two tokens.
LAPTOP = CostTable(
    [1, 4, 8, 16, 64], [30e-3, 40e-3, 47e-3, 60e-3, 150e-3], [16, 64, 512], [45e-3, 85e-3, 435e-3], 1e-6, 1e-8, 1e-8
)
# A device whose steps all take the same time.
FLAT = CostTable([256], [25e-3], [16, 8192], [25e-3, 25e-3], 0.0, 0.0, 0.0)
# A device whose cost jumps, for example where the weights of more experts are read: two decodes more take three times as long.
CLIFF = CostTable([1, 20, 22], [8e-3, 20e-3, 60e-3], [16, 64, 8192], [20e-3, 25e-3, 400e-3], 0.0, 0.0, 0.0)


@dataclass
class Device:
    """`noise` is the standard deviation of the logarithm of a duration. A share `outliers` of the steps takes much longer."""

    table: CostTable
    noise: float = 0.03
    outliers: float = 0.01
    random: random.Random = field(default_factory=lambda: random.Random(7))

    def seconds(self, shape: StepShape) -> float:
        pause = self.random.choice((0.01, 0.1, 2.0)) if self.random.random() < self.outliers else 0.0
        return self.table.predict(shape) * math.exp(self.random.gauss(0, self.noise)) + pause

    def teach(self, cost: StepCost, shapes: Iterator[StepShape]) -> None:
        for shape in shapes:
            cost.observe(shape, self.seconds(shape))


@dataclass
class ColdDevice(Device):
    """A device whose first `slow` steps take longer: at first ten times as long, then less and less."""

    slow: int = 40
    num_steps: int = 0

    def seconds(self, shape: StepShape) -> float:
        self.num_steps += 1
        return super().seconds(shape) * (1 + 9 * max(0.0, 1 - self.num_steps / self.slow))


@dataclass
class CompilingDevice(Device):
    """A device that compiles a kernel for a third of a second at the first step of each octave of rows or tokens."""

    seen: set[tuple[bool, int]] = field(default_factory=set)

    def seconds(self, shape: StepShape) -> float:
        size = shape.prompt_tokens > 0, (shape.decodes + shape.prompt_tokens).bit_length()
        compiled = size in self.seen
        self.seen.add(size)
        return super().seconds(shape) + (0.0 if compiled else 0.3)


def scaled(table: CostTable, factor: float) -> CostTable:
    return CostTable(
        table.decode_rows,
        [seconds * factor for seconds in table.decode_seconds],
        table.step_tokens,
        [seconds * factor for seconds in table.step_seconds],
        table.kv_token_seconds * factor,
        table.attention_pair_seconds * factor,
        table.long_pair_seconds * factor,
    )


def chat_steps(num: int, seed: int = 3, *, most_rows: int = 200, most_tokens: int = 4000) -> Iterator[StepShape]:
    """Yield the shapes of steps of a busy server: the batch grows and shrinks, and three steps in ten contain a prompt."""
    rng = random.Random(seed)
    rows = most_rows / 5
    for _ in range(num):
        rows = min(most_rows, max(1.0, rows + rng.gauss(0, 3)))
        decodes = int(rows)
        kv_tokens = int(decodes * rng.uniform(300, 900))
        if rng.random() < 0.3:
            tokens = int(min(most_tokens, max(1, rng.lognormvariate(6, 0.8))))
            yield StepShape.with_chunk(decodes, kv_tokens, tokens, rng.choice((0, 0, 0, 2000, 30000)))
        else:
            yield StepShape(decodes, kv_tokens, 0, 0)


def median_error(cost: StepCost, table: CostTable, shapes: Iterator[StepShape]) -> float:
    """Return the median relative error of predictions of steps of a device without noise."""
    errors = sorted(abs(cost.predict(shape) / table.predict(shape) - 1) for shape in shapes)
    return errors[len(errors) // 2]
