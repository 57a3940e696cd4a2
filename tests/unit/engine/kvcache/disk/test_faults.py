"""Tests real faults of the disk: each turns the store off with its reason, raises nothing, and the store comes back by itself.

The clock is the test's, so an attempt to turn on again comes when the test wants it.
"""

import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest

from engine.kvcache.disk.outcome import Outcome
from engine.kvcache.disk.record_files import RecordFiles
from engine.kvcache.disk.write_policy import Refusal
from tests.support.clock import Clock
from tests.support.disk_store import digest_of, is_right, open_store, read, scanned, wait_for, write
from tests.support.loop_disk import loop_disk
from tests.support.small_disk import fill, small_disk

RETRY = 5.0
NUM_BYTES = 250_000  # of a record: larger than what a file system reads ahead


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def opened(clock):
    """Yield a function that opens a store on the test's clock. The fixture checks and closes it."""
    with contextlib.ExitStack() as stack:

        def open_here(folder, num_records=8, num_bytes=NUM_BYTES, **settings):
            store = open_store(folder, num_records, num_bytes, clock=clock, retry=RETRY, inspect=1.0, **settings)
            stack.callback(store.close)
            stack.callback(store.check)
            return store

        yield open_here


def is_off(store, reason):
    """Wait until the store is off for `reason`, and check that it then answers everything with OFF or nothing."""
    wait_for(store, lambda: not store.health.is_on)
    assert store.health.reason is reason
    assert store.reserve(digest_of(99), digest_of(99)) is Refusal.OFF
    assert store.find(digest_of(0)) is None
    return True


def attempts(store, clock):
    """Let the store try once to turn on, and return whether it is on."""
    clock.now = store.health._retry_at
    wait_for(store, lambda: store.health.is_on or store.health._retry_at > clock.now)
    return store.health.is_on


def works(store, numbers=range(4)):
    """Write, and read what was written."""
    outcomes = {write(store, digest_of(number)) for number in numbers}
    return outcomes <= {Outcome.OK, Refusal.PRESENT} and all(is_right(store, digest_of(number)) for number in numbers)


def test_a_disk_that_is_full_at_the_start_turns_it_off_until_there_is_space(tmp_path, opened, clock):
    with small_disk(tmp_path / "small") as disk:
        fill(disk)
        store = opened(disk / "kv")
        assert is_off(store, Outcome.DISK_FULL)
        assert not attempts(store, clock)
        (disk / "filler").unlink()
        assert attempts(store, clock)
        assert works(scanned(store))
        assert store.health.outages == {Outcome.DISK_FULL: 1}


def test_a_disk_that_holds_a_part_of_the_cap_is_used_as_far_as_it_goes(tmp_path, opened, clock):
    with small_disk(tmp_path / "small", "4m") as disk:
        fill(disk, leave=5 << 19)
        store = opened(disk / "kv", 12)
        wait_for(store, lambda: store.index.num_slots == 8)
        assert works(store)
        wait_for(store, lambda: store._upkeep._scan_at is not None)
        (disk / "filler").unlink()
        clock.now += 300.0
        assert works(scanned(store), range(12))
        assert store.index.num_slots == 12
        assert store.health.outages == {}


def test_a_disk_that_fills_up_later_changes_nothing_since_the_files_are_allocated(tmp_path, opened):
    with small_disk(tmp_path / "small") as disk:
        store = scanned(opened(disk / "kv"))
        fill(disk)
        assert works(store, range(8))
        assert store.health.outages == {}


def test_a_disk_without_inodes_turns_it_off_until_there_are_some(tmp_path, opened, clock):
    with small_disk(tmp_path / "small", "8m,nr_inodes=4") as disk:
        (disk / "a").touch()
        (disk / "b").touch()
        store = opened(disk / "kv")
        assert is_off(store, Outcome.DISK_FULL)
        (disk / "a").unlink()
        (disk / "b").unlink()
        assert not attempts(store, clock)  # folder, lock and key take three inodes, and one is the root's
        subprocess.run(["mount", "-o", "remount,nr_inodes=100", str(disk)], check=True)
        assert attempts(store, clock)
        assert works(scanned(store))


def test_a_folder_that_is_deleted_is_made_again_and_what_it_held_is_not_found(tmp_path, opened, clock):
    store = scanned(opened(tmp_path / "kv"))
    assert works(store)
    key = store.key
    shutil.rmtree(tmp_path / "kv")
    clock.now += 1.0
    assert is_off(store, Outcome.GONE)
    assert attempts(store, clock)
    scanned(store)
    assert read(store, digest_of(0)) is None
    assert works(store)
    assert (tmp_path / "kv" / "key").read_bytes() == store.key == key
    assert store.index.num_slots == 8


def test_a_folder_that_is_replaced_by_another_is_read(tmp_path, opened, clock):
    store = scanned(opened(tmp_path / "kv"))
    assert works(store)
    shutil.copytree(tmp_path / "kv", tmp_path / "copy")
    shutil.rmtree(tmp_path / "kv")
    (tmp_path / "copy").rename(tmp_path / "kv")
    clock.now += 1.0
    assert is_off(store, Outcome.GONE)
    assert attempts(store, clock)
    scanned(store)
    assert all(is_right(store, digest_of(number)) for number in range(4))


def test_a_folder_that_another_process_took_meanwhile_is_left_to_it(tmp_path, opened, clock):
    store = scanned(opened(tmp_path / "kv"))
    shutil.rmtree(tmp_path / "kv")
    other = scanned(open_store(tmp_path / "kv", 8, NUM_BYTES))
    clock.now += 1.0
    assert is_off(store, Outcome.GONE)
    assert not attempts(store, clock)
    assert store.health.reason is Outcome.IN_USE
    assert works(other)
    assert other.close()
    assert not attempts(store, clock)
    assert store.health.reason is Outcome.OTHER_KEY
    assert (tmp_path / "kv" / "key").read_bytes() == other.key != store.key


def test_moves_on_their_way_while_the_folder_vanishes_are_never_found_wrong(tmp_path, opened, clock):
    store = scanned(opened(tmp_path / "kv", num_bytes=5000))
    assert works(store)
    pinned, reserved = store.find(digest_of(1)), store.reserve(digest_of(7), digest_of(7))
    store.index.pin(pinned)
    shutil.rmtree(tmp_path / "kv")
    clock.now += 1.0
    assert is_off(store, Outcome.GONE)
    assert attempts(store, clock)
    scanned(store)
    into = memoryview(bytearray(5000))
    store.submit_read(pinned, digest_of(1), into)
    store.submit_write(reserved.slot, digest_of(7), digest_of(7), into)
    wait_for(store, lambda: store.counts.moves.total() == 8 + 2 and not store.index.condemned)
    store.check()
    assert read(store, digest_of(7)) is None
    assert works(store, range(8))


def test_unreadable_blocks_turn_it_off_and_cost_only_their_records(tmp_path, opened, clock):
    with loop_disk(tmp_path / "disk") as disk:
        store = scanned(opened(disk.folder / "kv", 80))
        assert store.files.is_direct
        assert works(store, range(80))
        disk.fail_reads()
        lost = [number for number in range(80) if store.health.is_on and read(store, digest_of(number)) is Outcome.IO_ERROR]
        assert len(lost) == 1
        assert is_off(store, Outcome.IO_ERROR)
        disk.heal()
        assert attempts(store, clock)
        found = [number for number in range(80) if read(store, digest_of(number)) in (None, Outcome.CORRUPT, Outcome.EMPTY)]
        assert lost[0] in found
        assert len(found) < 80
        wait_for(store, lambda: not store.index.condemned)
        assert works(store, range(80))
        assert store.counts.dropped[Outcome.IO_ERROR] == 1


def test_a_device_that_fails_to_write_turns_it_off_until_it_writes_again(tmp_path, opened, clock):
    """The image of the device lies on a disk that is full, so the device has no place for blocks that were never written."""
    with small_disk(tmp_path / "small", "8m") as outer, loop_disk(outer / "disk") as disk:
        store = scanned(opened(disk.folder / "kv", 60))
        assert works(store)
        fill(outer)
        outcomes = []
        for number in range(10, 60):
            outcomes.append(write(store, digest_of(number)))
            if not store.health.is_on:
                break
        assert outcomes[-1] in (Outcome.IO_ERROR, Outcome.DISK_FULL)
        assert is_off(store, outcomes[-1])
        (outer / "filler").unlink()
        assert attempts(store, clock)
        assert works(store)
        assert works(store, range(10, 14))


def test_a_start_on_a_disk_with_unreadable_blocks_uses_the_others(tmp_path, opened, clock):
    with loop_disk(tmp_path / "disk") as disk:
        store = scanned(opened(disk.folder / "kv", 80))
        assert works(store, range(80))
        assert store.close()
        disk.fail_reads()
        store = opened(disk.folder / "kv", 80)
        wait_for(store, lambda: store.is_scanned or not store.health.is_on)
        if store.health.is_on:
            assert 0 < store.index.num_slots < 80
            assert store.index.num_retired == store.counts.dropped[Outcome.IO_ERROR] == 80 - store.index.num_slots
        else:  # the metadata of a file lies in the unreadable half
            assert store.health.reason is Outcome.IO_ERROR
        disk.heal()


def test_a_file_system_that_turns_read_only_turns_it_off_until_a_repaired_one_is_mounted(tmp_path, opened, clock):
    with loop_disk(tmp_path / "disk") as disk:
        store = scanned(opened(disk.folder / "kv"))
        assert works(store)
        disk.turn_read_only()
        assert write(store, digest_of(10)) is Outcome.READ_ONLY
        assert is_off(store, Outcome.READ_ONLY)
        assert not attempts(store, clock)
        disk.replace()
        assert attempts(store, clock)
        scanned(store)
        assert all(is_right(store, digest_of(number)) for number in range(4))
        assert works(store, range(10, 14))


def test_a_start_on_a_read_only_file_system_is_no_error(tmp_path, opened, clock):
    with small_disk(tmp_path / "small") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        store = opened(disk / "kv")
        key = store.key
        assert is_off(store, Outcome.READ_ONLY)
        assert not attempts(store, clock)
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert attempts(store, clock)
        assert works(scanned(store))
        assert store.key == key


def test_slow_reads_turn_it_off_until_the_disk_is_fast_again(tmp_path):
    with loop_disk(tmp_path / "disk") as disk, contextlib.ExitStack() as stack:
        disk.slow_reads(None)
        store = scanned(open_store(disk.folder / "kv", 40, NUM_BYTES, slow_read=0.05, retry=0.01, max_retry=0.2))
        stack.callback(store.close)
        assert works(store, range(40))
        disk.slow_reads(1 << 20)  # a record then takes 0.25 s
        numbers = iter(range(40))
        while store.health.is_on:
            read(store, digest_of(next(numbers)))
        assert store.health.reason is Outcome.SLOW
        disk.slow_reads(None)
        wait_for(store, lambda: store.health.is_on)
        assert all(is_right(store, digest_of(number)) for number in range(40))


def test_a_read_that_hangs_holds_up_neither_other_moves_nor_the_owner(tmp_path, opened, clock, monkeypatch):
    """No file system here hangs when asked to, so the read of one slot is made to wait for a pipe."""
    store = scanned(opened(tmp_path / "kv", num_threads=1))
    assert works(store)
    pipe = tmp_path / "pipe"
    subprocess.run(["mkfifo", str(pipe)], check=True)
    whole = RecordFiles.read
    monkeypatch.setattr(RecordFiles, "read", lambda *args: (pipe.read_bytes(), whole(*args))[1])
    slots = [store.find(digest_of(number)) for number in range(2)]
    for number, slot in enumerate(slots):
        store.index.pin(slot)
        store.submit_read(slot, digest_of(number), memoryview(bytearray(NUM_BYTES)))
    wait_for(store, lambda: store._workers._reading_since)
    clock.now += 3.1
    assert store.poll() == []
    assert [(move.slot, move.outcome) for move in store.poll(30)] == [(slots[1], Outcome.OFF)]
    assert store.health.reason is Outcome.SLOW
    Path(pipe).write_bytes(b"go on")
    assert [(move.slot, move.outcome) for move in store.poll(30)] == [(slots[0], Outcome.OK)]
    monkeypatch.undo()
    assert attempts(store, clock)
    assert works(store)


def test_a_folder_that_may_not_be_entered_is_no_error(tmp_path, opened, clock, monkeypatch):
    """Root may enter every folder, so the refusal is made here."""

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as refused:
        refused.setattr(Path, "mkdir", refuse)
        store = opened(tmp_path / "kv")
        assert is_off(store, Outcome.DENIED)
        assert not attempts(store, clock)
    assert attempts(store, clock)
    assert works(scanned(store))
