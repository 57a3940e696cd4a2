"""The memory that steps need, measured on a simulated device: whatever serving does later must fit beside the KV cache."""

import random
from dataclasses import dataclass, field
from functools import partial

import pytest

from engine.device.memory import Trials, measure


@dataclass
class Device:
    """A device with `total` bytes. Steps take memory and give it back; graphs, and what a first use loads, stay."""

    total: int
    used: int = 0
    most: int = 0
    pool: int = 0  # of the graphs: as large as the largest captured so far
    loaded: set[str] = field(default_factory=set)

    def take(self, size: int) -> None:
        self.used += size
        self.most = max(self.most, self.used)
        assert self.used <= self.total, "out of memory"

    def load(self, name: str, size: int) -> None:
        if name not in self.loaded:
            self.loaded.add(name)
            self.take(size)

    def step(self, name: str, size: int, *, kept: int = 0) -> None:
        """A step that takes `size` bytes while it runs; its first run keeps `kept` bytes for good."""
        self.load(name, kept)
        self.take(size)
        self.used -= size

    def capture(self, size: int, own: int) -> None:
        """A graph whose tensors take `size` bytes of the shared pool, and whose own copy takes `own`."""
        self.take(max(0, size - self.pool) + own)
        self.pool = max(self.pool, size)

    # The device is its own probe.
    def free(self) -> int:
        return self.total - self.used

    def peak(self, run) -> int:
        self.most = self.used
        run()
        return self.most - self.used


def trials(device, *, steps, long_context, graphs, own):
    """`steps` and `long_context` are (size, kept); `graphs` are pool sizes, the largest two first."""
    return Trials(
        steps=[partial(device.step, f"step {i}", size, kept=kept) for i, (size, kept) in enumerate(steps)],
        long_context=None if long_context is None else partial(device.step, "context", long_context[0], kept=long_context[1]),
        captures=[partial(device.capture, size, own) for size in graphs[:6]],
        num_graphs=len(graphs),
    )


@pytest.mark.parametrize("seed", range(50))
def test_all_graphs_and_the_largest_step_fit_beside_a_cache_of_what_is_left(seed):
    r = random.Random(seed)
    steps = [(r.randint(1, 500), r.choice([0, r.randint(0, 100)])) for _ in range(3)]
    long_context = r.choice([None, (r.randint(1, 300), r.randint(0, 20))])
    sizes = sorted((r.randint(1, 200) for _ in range(r.choice([0, 2, 5, 30]))), reverse=True)
    graphs, own = [*sizes[:2], *sizes[:1:-1]], r.randint(0, 5)
    device = Device(10_000, used=r.randint(0, 2000))
    needs = measure(device, trials(device, steps=steps, long_context=long_context, graphs=graphs, own=own))
    cache = device.free() - needs.total
    assert cache > 0
    device.take(cache)
    for size in graphs[6:]:
        device.capture(size, own)
    for i, (size, kept) in enumerate(steps):  # a step that is as large as a trial, at the end of the longest context
        device.step(f"step {i}", size + (long_context[0] if long_context else 0), kept=kept)


def test_each_kind_of_need_is_in_the_total():
    device = Device(10_000)
    plain = {"steps": [(100, 0)], "long_context": None, "graphs": [], "own": 0}
    assert measure(device, trials(device, **plain)) == (100, 0, 0)
    for change, expected in [
        ({"steps": [(100, 0), (70, 0), (300, 0)]}, (300, 0, 0)),
        ({"long_context": (40, 0)}, (100, 40, 0)),
        ({"graphs": [50] * 20, "own": 3}, (100, 0, 14 * 3)),
    ]:
        fresh = Device(10_000)
        assert measure(fresh, trials(fresh, **plain | change)) == expected


def test_what_a_first_step_keeps_is_missing_from_the_free_memory_and_is_not_counted_twice():
    device = Device(1000)
    needs = measure(device, trials(device, steps=[(100, 250)], long_context=(10, 30), graphs=[], own=0))
    assert needs == (100, 10, 0)
    assert device.free() == 1000 - 250 - 30
