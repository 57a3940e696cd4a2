"""Runs an engine over disks that fail. The fake runner verifies each block that it reads, so every request that ends is right.

The file systems are real: a small tmpfs, and an ext4 on a loop device. Mounting them takes root; the tests are skipped without.
"""

import random
import shutil
import time
from functools import partial

import pytest

from engine.config import CacheConfig, EngineConfig, FakeConfig, ModelLimits
from engine.core import Core
from engine.fake import build_fake, expected_tokens
from engine.fake_device import SimulatedDevice, SimulatedTime
from engine.messages import Submit, pack_tokens
from engine.request import SamplingParams
from tests.support.loop_disk import loop_disk
from tests.support.small_disk import fill, small_disk

LIMITS = ModelLimits(max_model_len=400, vocab_size=50, eos_token_ids=(3,), dtype="float32")
PARAMS = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
PAGE, BLOCK = 4096, 4
NUM_PROMPTS = 6


class Engine:
    """Runs prompts one after the other. Its GPU cache holds one of them, and its host tier a part of one."""

    def __init__(self, folder, *, disk_bytes: int = 8 << 20, real_time: bool = False) -> None:
        self.time = SimulatedTime()
        self.clock = time.monotonic if real_time else self.time.clock
        self.config = EngineConfig(
            model="none",
            runner="fake",
            debug_checks=True,
            cache=CacheConfig(
                block_size=BLOCK,
                num_blocks=60,
                host_tier_bytes=20 * PAGE,
                disk_tier_folder=str(folder),
                disk_tier_bytes=disk_bytes,
            ),
            fake=FakeConfig(step_ms=1.0, block_bytes=PAGE),
        )
        self.number = 0
        self.open()

    def open(self) -> None:
        device = partial(SimulatedDevice, clock=self.clock, sleep=self.time.sleep)
        self.core = Core(build_fake(self.config, LIMITS, make_device=device), clock=self.clock)
        self.core.find_records(5.0)

    def reopen(self) -> None:
        self.core.close()
        self.open()

    def run(self, prompt: list[int]) -> int:
        """Generate from a prompt, and check the tokens. Returns how many prompt tokens came from disk."""
        before, self.number = self.disk.cached_tokens, self.number + 1
        self.core.submit(Submit(request_id=f"r{self.number}", prompt=pack_tokens(prompt), params=PARAMS, seed=0))
        events = []
        while self.core.has_work:
            events += self.core.step()
        assert [token for event in events for token in event.tokens] == expected_tokens(prompt, 4, PARAMS, 0, LIMITS)
        assert events[-1].finish is not None
        return self.disk.cached_tokens - before

    def run_all(self) -> int:
        return sum(self.run(prompt) for prompt in prompts())

    def save(self) -> None:
        """Let the disk tier write what it wants."""
        while self.core._scheduler.cache.tiers.has_saves:
            self.core._scheduler.tend(0.01)
            while self.core.has_work:
                self.core.step()

    def wait(self, seconds: float, *, until) -> None:
        """Let simulated time pass, and the disk tier do its work meanwhile."""
        for number in range(3000):  # calls into the disk may take longer than simulated time does
            if until(self):
                return
            self.time.now += seconds / 200 if number < 200 else 0.0
            self.core._scheduler.tend(0.01)
            while self.core.has_work:  # copies to the host of what is to be written
                self.core.step()
        raise AssertionError("waited in vain")

    @property
    def disk(self):
        return self.core.stats().tiers["disk"]


def prompts() -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(50) for _ in range(200)] for _ in range(NUM_PROMPTS)]


@pytest.fixture
def engine_on():
    """Return a function that makes an engine over a folder. The engine is closed after the test."""
    engines = []

    def make(folder, **options) -> Engine:
        engines.append(Engine(folder, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.core.close()


def is_off(engine) -> bool:
    return not engine.disk.num_on


def is_on(engine) -> bool:
    return bool(engine.disk.num_on)


def test_a_disk_that_works_is_hit_after_a_restart(engine_on, tmp_path):
    engine = engine_on(tmp_path / "kv")
    for prompt in prompts():
        assert engine.run(prompt) == 0
        engine.save()
    engine.reopen()
    assert engine.run_all() == NUM_PROMPTS * 196  # all but the last block, of which at least one token is computed
    assert engine.disk.outages == {}


@pytest.mark.parametrize("options", ["1m", "64m,nr_inodes=3"], ids=["no space", "no inodes"])
def test_a_disk_that_is_full_at_the_start_costs_only_the_tier(engine_on, tmp_path, options):
    with small_disk(tmp_path / "disk", options) as folder:
        engine = engine_on(folder / "kv", disk_bytes=32 << 20)
        engine.run_all()
        assert engine.disk.outages == {"disk_full": 1}
        engine.reopen()
        engine.run_all()
        engine.core.close()


def test_a_disk_that_is_filled_later_goes_on(engine_on, tmp_path):
    with small_disk(tmp_path / "disk", "16m") as folder:
        engine = engine_on(folder / "kv")
        engine.run_all()
        fill(folder)
        engine.reopen()
        assert engine.run_all() > 0
        assert engine.disk.outages == {}
        engine.core.close()


def test_reads_that_fail_turn_the_tier_off_and_it_comes_back(engine_on, tmp_path):
    with loop_disk(tmp_path / "disk") as disk:
        engine = engine_on(disk.folder / "kv", disk_bytes=24 << 20)
        engine.run_all()
        engine.reopen()
        disk.fail_reads()
        engine.run_all()
        assert set(engine.disk.outages) <= {"io_error"}
        disk.heal()
        engine.wait(1000.0, until=is_on)
        engine.run_all()
        engine.core.close()


def test_a_disk_that_turns_read_only_is_off_until_it_is_replaced(engine_on, tmp_path):
    with loop_disk(tmp_path / "disk") as disk:
        engine = engine_on(disk.folder / "kv")
        engine.run_all()
        disk.turn_read_only()
        other = [1 + token % 48 for token in prompts()[0]]
        engine.run(other)
        engine.wait(10.0, until=is_off)
        assert set(engine.disk.outages) == {"read_only"}
        engine.run_all()
        disk.replace()
        engine.wait(1000.0, until=is_on)
        engine.run_all()
        engine.core.close()


def test_a_folder_that_is_deleted_is_made_again(engine_on, tmp_path):
    engine = engine_on(tmp_path / "kv")
    engine.run_all()
    shutil.rmtree(tmp_path / "kv")
    engine.run_all()
    engine.wait(20.0, until=is_off)
    assert set(engine.disk.outages) == {"gone"}
    engine.wait(1000.0, until=is_on)
    engine.run_all()
    engine.reopen()
    assert engine.run_all() > 0


def test_slow_reads_turn_the_tier_off_and_no_request_waits_for_them(engine_on, tmp_path):
    with loop_disk(tmp_path / "disk") as disk:
        engine = engine_on(disk.folder / "kv", disk_bytes=24 << 20, real_time=True)
        engine.run(prompts()[0])
        engine.save()
        engine.reopen()
        disk.slow_reads(PAGE)
        engine.run(prompts()[0])
        assert engine.disk.outages == {"slow": 1}
        disk.slow_reads(None)
        engine.core.close()
