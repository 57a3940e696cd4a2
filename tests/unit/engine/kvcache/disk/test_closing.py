"""Tests the end of a store: nothing that was forgotten comes back, and a slow disk does not hold the process."""

import threading

import pytest

from engine.kvcache.disk.outcome import Outcome
from engine.kvcache.disk.segments import SegmentFile
from tests.support.disk_store import STUCK, digest_of, family_of, open_store, read, scanned, wait_for, write


@pytest.fixture
def filled(tmp_path):
    """Return a function that opens the folder of eight records, in two files, which an earlier store wrote."""

    def open_here(num_records=8, **settings):
        return open_store(tmp_path / "kv", num_records, **settings)

    store = scanned(open_here())
    assert {write(store, digest_of(number), family=family_of(number)) for number in range(8)} == {Outcome.OK}
    assert store.close()
    return open_here


def left(store):
    """Close a store after its scan, and return which records it found."""
    found = [number for number in range(8) if store.find(digest_of(number)) is not None]
    assert store.close()
    return found


def test_a_family_that_is_forgotten_before_its_slots_are_scanned_does_not_come_back(filled):
    store = filled()
    store.forget_family(family_of(6))
    assert store.close()
    assert left(scanned(filled())) == [0, 1, 2, 3]


def test_nothing_comes_back_that_was_there_when_everything_was_forgotten_before_the_scan(filled):
    store = filled()
    store.forget_all()
    assert store.close()
    assert left(scanned(filled())) == []


def test_what_is_written_after_everything_was_forgotten_comes_back(filled):
    store = filled()
    store.forget_all()
    wait_for(store, lambda: store.index.num_slots == 8 and not store.index.condemned)
    assert write(store, digest_of(2)) is Outcome.OK
    assert store.close()
    assert left(scanned(filled())) == [2]


def test_closing_while_a_forgotten_family_is_sought_allocates_no_file(filled, tmp_path):
    store = filled(20)
    store.forget_family(family_of(6))
    assert store.close()
    assert len(list((tmp_path / "kv").glob("segment-*"))) == 2
    assert left(scanned(filled())) == [0, 1, 2, 3]


def test_a_forgotten_record_that_is_pinned_at_the_end_does_not_come_back(filled):
    store = scanned(filled())
    store.index.pin(store.find(digest_of(2)))
    store.forget_family(family_of(2))
    assert store.close()
    assert left(scanned(filled())) == [4, 5, 6, 7]


def test_a_record_that_lost_its_slot_to_a_write_that_never_came_does_not_come_back(filled):
    store = scanned(filled())
    assert store.reserve(digest_of(100), family_of(100)).evicted == digest_of(0)
    store.forget_family(family_of(0))
    assert store.close()
    assert left(scanned(filled())) == [4, 5, 6, 7]


def test_closing_syncs_each_file_once(filled, monkeypatch):
    store = scanned(filled())
    store.forget_all()
    synced = []
    sync = SegmentFile.sync
    monkeypatch.setattr(SegmentFile, "sync", lambda segment: (synced.append(segment.path.name), sync(segment)))
    assert store.close()
    assert sorted(synced) == ["segment-00000", "segment-00001"]
    assert left(scanned(filled())) == []


def test_closing_ends_between_two_writes_when_its_time_is_over(filled, monkeypatch):
    now = [0.0]
    store = scanned(filled(clock=lambda: now[0]))
    store.forget_all()
    written = []

    def write_slowly(segment, pages, offset, *, aligned):
        written.append(offset)
        now[0] += 2.0

    monkeypatch.setattr(SegmentFile, "write", write_slowly)
    assert not store.close(5.0)
    assert len(written) == 3


def test_a_disk_that_hangs_does_not_hold_the_end(filled, monkeypatch):
    store = scanned(filled())
    store.forget_family(family_of(0))
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(segment):
        hangs.set()
        assert goes_on.wait(STUCK)

    monkeypatch.setattr(SegmentFile, "sync", hang)
    assert not store.close(0.5)
    assert hangs.is_set()
    assert store.files.num_open
    goes_on.set()
    for thread in threading.enumerate():
        if thread.name == "disk-closing":
            thread.join(STUCK)
    store.files.close()
    store.files.folder.release()


def test_closing_says_so_if_the_disk_fails_while_it_erases(filled, monkeypatch):
    store = scanned(filled())
    store.forget_family(family_of(0))

    def fail(*_, **__):
        raise OSError(5, "as the test wants it")

    with monkeypatch.context() as patch:
        patch.setattr(SegmentFile, "write", fail)
        assert not store.close()
    store = scanned(filled())
    assert read(store, digest_of(0)) is not None
    assert store.close()
