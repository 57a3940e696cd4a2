"""Runs random requests over a small KV cache, a small host tier and a small disk tier, with restarts and faults of the disk.

The disk tier writes and reads real files. FakeRunner puts the simulated content of a block into the bytes of its record. It
verifies what it reads on the GPU, wherever that has been meanwhile, in this process or before a restart. After every operation,
the scheduler checks its own state, the caps of the tiers and the pins of their slots.
"""

import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.core import Core
from engine.messages import Submit, pack_tokens
from engine.plan import PER_TOKEN, PoolKind
from tests.property.test_scheduling import assert_as_alone
from tests.property.test_tiers import TieredWorkload

PAGE = 4096
RECORD = 2 * PAGE  # header and content


class DiskWorkload(TieredWorkload):
    """The disk tier lies in a folder that outlives the engines. With `faults`, it is damaged now and then."""

    block_bytes = PAGE
    aborted_share = 0.02  # a load from the disk takes many steps

    def __init__(self, rng: random.Random, folder: Path, *, overlap: bool, faults: bool = False) -> None:
        self.folder = folder / "kv"
        self.faults = faults
        self.seen: Counter[str] = Counter()
        super().__init__(rng, overlap=overlap)

    def make_core(self) -> Core:
        rng = self.rng
        window = PoolKind("window", rng.choice((1, 3, 8)))
        self.kinds = rng.choice((PER_TOKEN, PER_TOKEN, (*PER_TOKEN, window), (*PER_TOKEN, window, PoolKind("state"))))
        self.records = rng.choice((3, 100, 400))
        cache = msgspec.structs.replace(
            self.config.cache, disk_tier_folder=str(self.folder), disk_tier_bytes=PAGE + self.records * RECORD
        )
        self.config = msgspec.structs.replace(self.config, cache=cache)
        core = super().make_core()
        self.sessions = self.sessions[:2]
        return core

    def operate(self) -> None:
        action = self.rng.random()
        if action < 0.2:
            self.submit()
        elif action < 0.24:
            self.abort()
        elif action < 0.26:
            self.restart()
        elif action < 0.29 and self.faults:
            self.damage()
        elif action < 0.31:
            self.wait_for_disk()  # time that passes during a read makes it a slow one
            self.time.now += 6.0  # a disk that is off is tried again
        elif action < 0.6:
            self.wait_for_disk()
            self.step()
        else:
            self.step()
        self.check()

    def check(self) -> None:
        super().check()
        disk = self.core.stats().tiers["disk"]
        assert disk.blocks_used <= disk.blocks_limit <= self.records
        assert sum(path.stat().st_size for path in self.folder.glob("segment-*")) <= PAGE + self.records * RECORD
        assert self.reported.disk <= disk.cached_tokens

    def wait_for_disk(self) -> None:
        """Let all reads and writes end that are under way. How many of them end otherwise depends on the machine."""
        while not self.core._disk.is_idle:
            self.scheduler.tend(0.01)

    def restart(self) -> None:
        """End the engine, in order or as if it had been killed, and continue its requests in a new one."""
        self.count()
        self.stop()
        for name, ending in self.endings.items():
            assert_as_alone(self.submits[name], self.tokens[name], ending, self.config.fake.nan_token)
        live = [(submit, self.tokens[name]) for name, submit in self.submits.items() if name not in self.endings]
        self.submits, self.tokens, self.endings = {}, {}, {}
        self.stalls = 0
        self.core = self.start_core()
        self.scheduler = self.core._scheduler
        for submit, tokens in live:
            fields = {name: getattr(submit, name) for name in submit.__struct_fields__}
            self.offer(Submit(**fields | {"outputs": pack_tokens(tokens), "fork_of": None}))

    def stop(self) -> None:
        if self.rng.random() < 0.5:
            self.core.close()
        else:
            kill(self.core)

    def damage(self) -> None:
        files = sorted(self.folder.glob("segment-*"))
        kind = self.rng.choice(("flip", "flip", "truncate", "delete a file", "delete the folder", "other key"))
        self.seen[kind] += 1
        if kind == "delete the folder":
            shutil.rmtree(self.folder, ignore_errors=True)
        elif kind == "other key" and self.folder.exists():
            (self.folder / "key").write_bytes(self.rng.randbytes(32))
        elif files:
            file = self.rng.choice(files)
            size = file.stat().st_size
            if kind == "flip" and size:
                with file.open("r+b") as opened:
                    opened.seek(self.rng.randrange(size))
                    opened.write(self.rng.randbytes(8))
            elif kind == "truncate":
                with file.open("r+b") as opened:
                    opened.truncate(self.rng.randint(0, size))
            elif kind == "delete a file":
                file.unlink()

    def count(self) -> None:
        stats = self.core.stats()
        disk, decisions = stats.tiers["disk"], self.scheduler.cache.tiers.decisions
        self.seen.update(
            restarts=1,
            written=disk.num_demoted,
            read=disk.num_promoted,
            evicted=disk.num_evicted,
            failed=disk.num_failed,
            dropped=self.core._disk.store.counts.dropped.total(),
            tokens=self.reported.disk,
            **{f"decided to {decision}": num for decision, num in decisions.items()},
        )

    def run(self, operations: int) -> None:
        try:
            for _ in range(operations):
                self.operate()
            self.drain()
            self.check()
            self.check_end()
            self.count()
        finally:
            self.core.close()


def kill(core: Core) -> None:
    """Leave the folder as a process does that is killed between two of its writes: without the last erasures."""
    store = core._disk.store
    store._workers.close(10.0)
    store.files.close()
    store.files.folder.release()


@pytest.mark.parametrize("overlap", [False, True])
def test_random_operations_over_three_tiers_with_restarts(overlap, tmp_path):
    seen: Counter[str] = Counter()
    for seed in range(10):
        workload = DiskWorkload(random.Random(seed), tmp_path / str(seed), overlap=overlap)
        workload.run(300)
        seen += workload.seen
    expected = ("restarts", "written", "read", "evicted", "tokens", "decided to load", "decided to part", "decided to gave_up")
    assert min(seen[name] for name in expected) > 5, seen
    assert not seen["dropped"], seen


def test_random_operations_over_three_tiers_with_faults(tmp_path):
    seen: Counter[str] = Counter()
    for seed in range(12):
        workload = DiskWorkload(random.Random(seed), tmp_path / str(seed), overlap=seed % 2 == 0, faults=True)
        workload.run(300)
        seen += workload.seen
    kinds = ("flip", "truncate", "delete a file", "delete the folder", "other key")
    assert min(seen[name] for name in (*kinds, "read", "dropped")) > 3, seen


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False), overlap=st.booleans(), operations=st.integers(1, 60), faults=st.booleans())
def test_short_random_runs_over_three_tiers_that_can_be_shrunk(rng, overlap, operations, faults):
    with tempfile.TemporaryDirectory(prefix="tidegate-test-") as folder:
        DiskWorkload(rng, Path(folder), overlap=overlap, faults=faults).run(operations)
