"""Tests the upkeep step by step: the test runs each queued piece of work itself, in the order that it wants."""

import errno
import shutil
from collections import deque

import pytest

from engine.kvcache.disk.counts import Counts
from engine.kvcache.disk.folder import Folder
from engine.kvcache.disk.health import Health
from engine.kvcache.disk.index import SlotIndex
from engine.kvcache.disk.outcome import Outcome
from engine.kvcache.disk.record_files import RecordFiles, Sizes
from engine.kvcache.disk.records import PAGE, Header, RecordFormat
from engine.kvcache.disk.scan import Stamps
from engine.kvcache.disk.segments import SegmentFile
from engine.kvcache.disk.settings import DiskSettings
from engine.kvcache.disk.upkeep import Upkeep
from tests.support.disk_store import digest_of

NUM_SLOTS = 200


class HandWorkers:
    """Queues work as Workers does. `step` runs one piece of it, what runs alone first."""

    def __init__(self):
        self.queue, self.alone = deque(), None

    def keep_up(self, work):
        self.queue.append(work)

    def run_alone(self, work):
        self.alone = work

    def step(self):
        work, self.alone = self.alone or self.queue.popleft(), None
        if work():
            self.queue.append(work)


class Tier:
    """The parts of a store that upkeep works on, in `path`, with the time in `now`."""

    def __init__(self, path):
        self.now = 0.0
        self.settings = DiskSettings(folder=path, max_bytes=1 << 30)
        self.folder = Folder(path)
        self.folder.claim()
        form = RecordFormat(10, b"", self.folder.key)
        sizes = Sizes(form.stride, PAGE + NUM_SLOTS * form.stride, 1 << 30)
        self.files = RecordFiles(self.folder, form, sizes, direct=False, stamp=Stamps().next)
        self.begin()

    def begin(self):
        """Begin as a start does, with no file open and nothing found."""
        self.files.close()
        self.index, self.health, self.workers = SlotIndex(), Health(self.settings, self.clock), HandWorkers()
        parts = (self.settings, self.files, self.index, self.health, self.workers, Counts(), Stamps(), self.clock)
        self.upkeep = Upkeep(*parts)

    def clock(self):
        return self.now

    def look_after(self):
        self.upkeep.take_news()
        self.upkeep.look_after()

    def run_all(self):
        self.look_after()
        while self.workers.queue or self.workers.alone:
            self.workers.step()
            self.look_after()

    def write(self, numbers):
        for number in numbers:
            slot = self.index.reserve(digest_of(number), digest_of(number)).slot
            assert self.files.write(slot, digest_of(number), digest_of(number), memoryview(bytes(10))) is Outcome.OK
            self.index.commit(slot)

    def records(self):
        return sum(isinstance(self.files.header(slot), Header) for slot in range(NUM_SLOTS))

    def replace(self, by=None):
        """Delete the folder or replace it by `by`, and let upkeep turn the store off and queue a probe."""
        shutil.rmtree(self.folder.path)
        if by is not None:
            by.rename(self.folder.path)
        self.health.turn_off(Outcome.GONE)
        self.now += self.settings.retry
        self.look_after()


@pytest.fixture
def tier(tmp_path):
    tier = Tier(tmp_path / "kv")
    tier.run_all()
    assert tier.upkeep.is_scanned
    yield tier
    tier.index.check()
    tier.files.close()
    tier.folder.release()


def test_slots_of_deleted_files_are_not_erased_in_the_files_that_replace_them(tier):
    tier.write(range(NUM_SLOTS))
    tier.index.forget_all()
    tier.look_after()
    tier.replace()
    erasures = list(tier.workers.queue)
    tier.workers.queue.clear()
    tier.run_all()
    tier.write(range(1000, 1000 + NUM_SLOTS))
    tier.workers.queue.extend(erasures)
    tier.run_all()
    assert tier.records() == len(tier.index) == NUM_SLOTS


def test_an_erasure_between_a_probe_and_the_reset_neither_erases_nor_frees_a_slot(tier, tmp_path):
    tier.write(range(3))
    shutil.copytree(tier.folder.path, tmp_path / "copy")
    tier.index.drop(tier.index.find(digest_of(1)))  # as if it could not be read
    tier.look_after()
    tier.replace(tmp_path / "copy")
    tier.workers.step()  # the probe
    tier.workers.step()  # the erasure
    tier.run_all()
    assert tier.records() == len(tier.index) == 3


def test_a_forgotten_record_is_not_found_when_its_files_are_mounted_again_before_it_was_erased(tier, tmp_path):
    tier.write(range(3))
    shutil.copytree(tier.folder.path, tmp_path / "mounted again")
    tier.index.forget_family(digest_of(1))
    tier.replace(tmp_path / "mounted again")
    tier.run_all()
    assert [number for number in range(3) if tier.index.find(digest_of(number)) is not None] == [0, 2]
    assert tier.records() == 2


def test_headers_that_are_gone_turn_the_store_off_and_the_scan_goes_on_when_they_are_back(tier, monkeypatch):
    tier.write(range(NUM_SLOTS))
    tier.begin()

    def gone(*_, **__):
        raise OSError(errno.ESTALE, "as after the loss of a server")

    with monkeypatch.context() as patch:
        patch.setattr(SegmentFile, "read", gone)
        tier.run_all()
        assert tier.health.reason is Outcome.GONE
        assert tier.index.num_retired == 0
    tier.now += tier.settings.retry
    tier.run_all()
    assert tier.health.is_on
    assert len(tier.index) == NUM_SLOTS
