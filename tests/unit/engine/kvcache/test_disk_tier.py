"""Tests of DiskTier with a real store: records go to the host and come from there, and each mask has records of its own."""

import pytest

from engine.kvcache.disk.workers import Kind
from engine.kvcache.disk.write_policy import Refusal
from engine.kvcache.disk_tier import DiskEnd, DiskTier
from engine.kvcache.host_memory import HostMemory
from engine.kvcache.kinds import ALL
from tests.support.clock import Clock
from tests.support.disk_store import STUCK, digest_of, open_store, payload_of, scanned, wait_for

INNER = ALL & ~2  # all kinds of pools but the second
SIZE = 5000


class Disk:
    """A DiskTier with four slots in the host."""

    def __init__(self, folder, *, records=6, **settings):
        self.clock = Clock()
        self.store = scanned(open_store(folder, records, SIZE, clock=self.clock, **settings))
        self.host = HostMemory(4, SIZE)
        self.tier = DiskTier(self.store, self.host, INNER)

    def write(self, number, mask=ALL, content=None):
        digest = digest_of(number)
        self.host.record(0)[:] = payload_of(content or digest, SIZE)
        assert self.tier.write(digest, digest, mask, 0) is None
        assert self.end() == DiskEnd(Kind.WRITE, 0, True)

    def end(self):
        """Return the next end of a read or write."""
        while not (ended := self.tier.poll(STUCK / 100)):
            pass
        (end,) = ended
        return end

    def read(self, number, slot=1):
        """Read the fullest record into a slot. Returns its mask, and whether the read ended well."""
        record = self.tier.find(digest_of(number))
        self.tier.pin(record)
        self.tier.read(record, slot)
        end = self.end()
        assert end[:2] == (Kind.READ, slot)
        return record.mask, end.ok


@pytest.fixture
def disk_in(tmp_path):
    """Return a function that makes a Disk in `tmp_path`. It is checked and closed after the test."""
    disks = []

    def make(**options):
        disks.append(Disk(tmp_path / "kv", **options))
        return disks[-1]

    yield make
    for disk in disks:
        disk.tier.check()
        disk.tier.close(STUCK)


def test_a_record_goes_from_one_slot_of_the_host_into_another(disk_in):
    disk = disk_in()
    assert disk.tier.find(digest_of(1)) is None
    disk.write(1)
    assert not disk.tier.is_looking
    assert disk.read(1, slot=3) == (ALL, True)
    assert disk.host.record(3) == payload_of(digest_of(1), SIZE)
    stats = disk.tier.stats()
    assert (stats.num_demoted, stats.num_promoted, stats.num_failed) == (1, 1, 0)
    assert (stats.demoted_bytes, stats.promoted_bytes) == (SIZE, SIZE)
    assert (stats.blocks_used, stats.blocks_limit, stats.num_on, stats.outages) == (1, 6, 1, {})


def test_the_fullest_record_of_a_content_is_found(disk_in):
    disk = disk_in()
    disk.write(1, INNER, content=b"inner")
    assert disk.tier.has(digest_of(1), INNER)
    assert not disk.tier.has(digest_of(1), ALL)
    assert disk.read(1) == (INNER, True)
    assert disk.host.record(1) == payload_of(b"inner", SIZE)
    disk.write(1, ALL, content=b"all")
    assert disk.tier.has(digest_of(1), INNER)
    assert disk.read(1) == (ALL, True)
    assert disk.host.record(1) == payload_of(b"all", SIZE)


def test_a_record_that_is_looked_for_counts_as_used(disk_in):
    disk = disk_in(records=2)
    disk.write(1)
    disk.write(2)
    assert disk.tier.has(digest_of(1), ALL)
    disk.write(3)
    assert [number for number in (1, 2, 3) if disk.tier.find(digest_of(number))] == [1, 3]
    assert disk.tier.stats().num_evicted == 1


def test_a_record_that_is_being_written_is_there_and_cannot_be_read_yet(disk_in):
    disk = disk_in()
    assert disk.tier.write(digest_of(1), digest_of(1), ALL, 0) is None
    assert disk.tier.has(digest_of(1), ALL)
    assert disk.tier.find(digest_of(1)) is None
    assert disk.tier.write(digest_of(1), digest_of(1), ALL, 2) is Refusal.PRESENT
    assert not disk.tier.is_idle
    assert disk.end().ok
    assert disk.tier.is_idle


def test_a_record_that_is_being_read_is_not_found_a_second_time(disk_in):
    disk = disk_in()
    disk.write(1)
    record = disk.tier.find(digest_of(1))
    disk.tier.pin(record)
    disk.tier.read(record, 1)
    assert disk.tier.find(digest_of(1)) is None
    assert disk.tier.has(digest_of(1), ALL)
    assert disk.end() == DiskEnd(Kind.READ, 1, True)
    assert disk.tier.find(digest_of(1)) == record


def test_a_pinned_record_is_not_evicted(disk_in):
    disk = disk_in(records=1)
    disk.write(1)
    record = disk.tier.find(digest_of(1))
    disk.tier.pin(record)
    assert disk.tier.write(digest_of(2), digest_of(2), ALL, 0) is Refusal.NO_SLOT
    disk.tier.unpin(record)
    disk.write(2)


def test_reads_are_taken_as_long_as_the_queue_has_room(disk_in):
    disk = disk_in(max_reads=1)
    disk.write(1)
    disk.write(2)
    assert disk.tier.takes_reads
    first, second = (disk.tier.find(digest_of(number)) for number in (1, 2))
    disk.tier.pin(first)
    disk.tier.pin(second)
    disk.tier.read(first, 1)
    assert not disk.tier.takes_reads
    assert disk.end().ok
    assert disk.tier.takes_reads
    disk.tier.read(second, 2)
    assert disk.end().ok


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_withdrawn_record_is_not_read(disk_in, when):
    disk = disk_in()
    disk.write(1)
    record = disk.tier.find(digest_of(1))
    disk.tier.pin(record)
    if when == "before":
        disk.tier.withdraw(digest_of(1))
    disk.tier.read(record, 1)
    if when == "meanwhile":
        disk.tier.withdraw(digest_of(1))
    assert disk.end() == DiskEnd(Kind.READ, 1, False)
    assert disk.tier.find(digest_of(1)) is None
    assert disk.tier.stats().num_failed == 1


def test_a_disk_that_is_off_has_nothing_and_takes_nothing(disk_in, tmp_path):
    disk = disk_in()
    disk.write(1)
    (tmp_path / "kv").rename(tmp_path / "elsewhere")
    disk.clock.now += 10.0
    wait_for(disk.store, lambda: not disk.tier.is_on)
    assert disk.tier.find(digest_of(1)) is None
    assert disk.tier.write(digest_of(2), digest_of(2), ALL, 0) is Refusal.OFF
    assert not disk.tier.is_looking
    assert (disk.tier.stats().num_on, disk.tier.stats().outages) == (0, {"gone": 1})


def test_a_record_pinned_while_the_folder_is_deleted_is_not_read_from_the_new_folder(disk_in, tmp_path):
    disk = disk_in()
    disk.write(1)
    record = disk.tier.find(digest_of(1))
    disk.tier.pin(record)
    (tmp_path / "kv").rename(tmp_path / "elsewhere")
    disk.clock.now += 10.0
    wait_for(disk.store, lambda: not disk.tier.is_on)
    disk.clock.now += 10.0
    wait_for(disk.store, lambda: disk.tier.is_on and disk.store.is_scanned)
    disk.tier.check()
    disk.write(2)
    disk.write(3)
    disk.tier.read(record, 1)
    assert disk.end() == DiskEnd(Kind.READ, 1, False)
    disk.tier.check()
    wait_for(disk.store, lambda: disk.store.index.num_slots == 6 and not disk.store.index.condemned)
    assert {disk.read(number) for number in (2, 3)} == {(ALL, True)}
