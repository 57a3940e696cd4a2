"""Tests the disk tier on a healthy disk: what is written is read again, after a restart too, and some blocks are not written."""

import itertools

import pytest

from engine.errors import InternalError
from engine.kvcache.disk.outcome import Outcome
from engine.kvcache.disk.workers import Kind
from engine.kvcache.disk.write_policy import Refusal
from tests.support.disk_store import digest_of, is_right, open_store, payload_of, read, scanned, wait_for, write


@pytest.fixture
def opened(tmp_path):
    """Yield a function that opens a store in `tmp_path` and closes the one before."""
    stores = []

    def open_next(num_records=6, *args, **settings):
        if stores:
            assert stores.pop().close()
        stores.append(scanned(open_store(tmp_path / "kv", num_records, *args, **settings)))
        return stores[-1]

    yield open_next
    for store in stores:
        store.check()
        assert store.close()


def kept(store, numbers=range(20)):
    """Return which of `numbers` the store finds, without using them."""
    return [number for number in numbers if store.find(digest_of(number)) is not None]


def reserve(store, number):
    return store.reserve(digest_of(number), digest_of(number))


def fill(store, numbers):
    assert {write(store, digest_of(number)) for number in numbers} == {Outcome.OK}


def test_what_was_written_is_read_again_also_after_a_restart(opened):
    fill(opened(), range(5))
    for direct in (True, False, True):
        store = opened(direct=direct)
        assert kept(store) == [0, 1, 2, 3, 4]
        assert all(is_right(store, digest_of(number)) for number in range(5))
        assert store.counts.moves == {(Kind.READ, Outcome.OK): 5}
        assert store.counts.bytes == {Kind.READ: 25_000}
        assert store.counts.dropped == {}


def test_the_order_of_writes_decides_which_records_of_an_earlier_run_go_first(opened):
    fill(opened(), (3, 1, 4, 5, 2, 0))
    store = opened()
    assert is_right(store, digest_of(3))
    fill(store, (10, 11))
    assert kept(store) == [0, 2, 3, 5, 10, 11]
    assert store.counts.evicted == 2


def test_writes_after_a_restart_are_later_than_all_before(opened):
    store = opened()
    store.files._stamp = itertools.count(1 << 62).__next__  # as by a clock that was years ahead
    fill(store, range(5))
    fill(opened(), (5, 6))
    fill(opened(), range(10, 14))
    assert {5, 6} <= set(kept(opened()))


@pytest.mark.parametrize(
    "change", [{"form": b"other"}, {"payload_bytes": 6000}, {"payload_bytes": 50_000}, {"key": bytes(32)}], ids=str
)
def test_records_of_another_format_are_ignored_and_their_slots_used(opened, change):
    max_bytes = 4096 + 8 * 60_000
    fill(opened(max_bytes=max_bytes, segment_bytes=1 << 20), range(8))
    store = opened(max_bytes=max_bytes, segment_bytes=1 << 20, **change)
    assert kept(store) == []
    if change.get("payload_bytes") != 50_000:
        assert store.counts.dropped[Outcome.FOREIGN] >= 8
    num_slots = store.index.num_slots
    assert num_slots == store.files.sizes.num_slots
    fill(store, range(100, 100 + num_slots))
    assert all(is_right(store, digest_of(number)) for number in range(100, 100 + num_slots))


def test_a_smaller_cap_deletes_files_and_a_larger_one_adds_some(opened, tmp_path):
    def size():
        return sum(file.stat().st_size for file in (tmp_path / "kv").glob("segment-*"))

    store = opened(20)
    fill(store, range(20))
    assert size() == 5 * (4096 + 4 * 3 * 4096)
    store = opened(6)
    assert len(kept(store)) == 6
    assert size() == 2 * 4096 + 6 * 3 * 4096
    assert all(is_right(store, digest_of(number)) for number in kept(store))
    store = opened(12)
    assert store.index.num_slots == 12
    assert len(kept(store)) == 6


def test_a_forgotten_record_stays_forgotten_after_a_restart(opened):
    store = opened()
    fill(store, range(4))
    store.forget_family(digest_of(2))
    assert read(store, digest_of(2)) is None
    wait_for(store, lambda: not store.index.condemned)
    assert kept(opened()) == [0, 1, 3]


def test_a_record_that_is_forgotten_just_before_the_end_is_erased(opened):
    store = opened()
    fill(store, range(4))
    store.forget_family(digest_of(2))
    assert kept(opened()) == [0, 1, 3]


def test_a_forgotten_digest_can_be_written_anew(opened):
    store = opened()
    fill(store, [0])
    store.forget_family(digest_of(0))
    assert write(store, digest_of(0), bytes(5000)) is Outcome.OK
    assert read(store, digest_of(0)) == bytes(5000)
    wait_for(store, lambda: not store.index.condemned)
    assert read(opened(), digest_of(0)) == bytes(5000)


def test_a_record_that_changed_on_disk_is_dropped_and_can_be_written_again(opened, tmp_path):
    store = opened()
    fill(store, range(2))
    slot = store.find(digest_of(1))
    with (tmp_path / "kv" / "segment-00000").open("r+b") as file:
        file.seek(store.files.sizes.where(slot)[1] + 4096 + 17)
        file.write(b"\xff\x00\xff")
    assert read(store, digest_of(1)) is Outcome.CORRUPT
    assert read(store, digest_of(1)) is None
    assert store.counts.dropped == {Outcome.CORRUPT: 1}
    assert store.health.is_on
    assert is_right(store, digest_of(0))
    fill(store, [1])
    assert is_right(store, digest_of(1))


@pytest.mark.parametrize("is_all", [False, True])
def test_moves_of_records_that_are_forgotten_meanwhile_do_not_end_well(opened, is_all):
    store = opened()
    fill(store, range(2))
    slot, reserved = store.find(digest_of(0)), reserve(store, 2)
    store.index.pin(slot)
    assert store.submit_read(slot, digest_of(0), memoryview(bytearray(5000)))
    if is_all:
        store.forget_all()
    else:
        for number in (0, 2):
            store.forget_family(digest_of(number))
    assert store.submit_write(reserved.slot, digest_of(2), digest_of(2), memoryview(bytes(5000)))
    wait_for(store, lambda: store.num_reading == store.num_writing == 0)
    assert store.counts.moves[Kind.READ, Outcome.FORGOTTEN] == store.counts.moves[Kind.WRITE, Outcome.FORGOTTEN] == 1
    assert kept(store) == ([] if is_all else [1])
    assert store.health.is_on
    assert kept(opened()) == ([] if is_all else [1])


def test_the_rate_of_writes_is_capped_on_the_given_clock(opened):
    now = [0.0]
    stride = 3 * 4096
    store = opened(12, clock=lambda: now[0], write_rate=stride, write_burst=2 * stride)
    assert [write(store, digest_of(number)) for number in range(3)] == [Outcome.OK, Outcome.OK, Refusal.RATE]
    now[0] = 1.0
    assert [write(store, digest_of(number)) for number in range(3, 5)] == [Outcome.OK, Refusal.RATE]
    assert is_right(store, digest_of(0))


def test_a_digest_is_written_once(opened):
    store = opened()
    fill(store, [0])
    assert write(store, digest_of(0)) is Refusal.PRESENT


def test_reservations_are_bounded_and_a_move_holds_its_slot(opened):
    store = opened(2, max_writes=3)
    fill(store, [0])
    store.index.pin(store.find(digest_of(0)))
    assert reserve(store, 1).evicted is None
    assert reserve(store, 2) is Refusal.NO_SLOT
    store = opened(6, max_writes=2)
    for number in (10, 11):
        reserve(store, number)
    assert reserve(store, 12) is Refusal.BUSY


@pytest.mark.parametrize("num_bytes", [4999, 5001])
def test_a_buffer_of_another_size_is_an_error(opened, num_bytes):
    store = opened()
    with pytest.raises(InternalError, match="5000 contiguous bytes"):
        store.submit_write(reserve(store, 0).slot, digest_of(0), digest_of(0), memoryview(bytes(num_bytes)))


def test_reading_into_a_buffer_that_cannot_be_written_is_an_error(opened):
    store = opened()
    with pytest.raises(InternalError, match="cannot be written"):
        store.submit_read(0, digest_of(0), memoryview(bytes(5000)))


def test_a_closed_store_takes_no_moves_and_gives_their_slots_back(tmp_path):
    store = scanned(open_store(tmp_path / "kv", 4))
    assert write(store, digest_of(0)) is Outcome.OK
    slot = store.find(digest_of(0))
    reserved = reserve(store, 1)
    store.index.pin(slot)
    assert store.close()
    assert not store.submit_read(slot, digest_of(0), memoryview(bytearray(5000)))
    assert not store.submit_write(reserved.slot, digest_of(1), digest_of(1), memoryview(bytes(5000)))
    assert store.counts.full_queues == store.counts.refused[Refusal.BUSY] == 1
    assert store.index.num_reserved == store.num_reading == store.num_writing == 0
    store.check()


def test_many_moves_at_once_end_once_each(opened):
    store = opened(40, num_threads=4, max_writes=40)
    payloads = {number: payload_of(digest_of(number), 5000) for number in range(40)}
    for number, payload in payloads.items():
        assert store.submit_write(reserve(store, number).slot, digest_of(number), digest_of(number), memoryview(payload))
    assert (store.num_reading, store.num_writing) == (0, 40)
    wait_for(store, lambda: store.num_writing == 0)
    assert store.counts.moves == {(Kind.WRITE, Outcome.OK): 40}
    buffers = {}
    for number in payloads:
        buffers[number] = bytearray(5000)
        slot = store.find(digest_of(number))
        store.index.pin(slot)
        assert store.submit_read(slot, digest_of(number), memoryview(buffers[number]))
    assert (store.num_reading, store.num_writing) == (40, 0)
    wait_for(store, lambda: store.num_reading == 0)
    assert store.counts.moves[Kind.READ, Outcome.OK] == 40
    assert buffers == payloads


def test_the_key_of_the_folder_is_known_and_stays(opened):
    key = opened().key
    assert opened().key == key
    assert opened(key=bytes(32)).key == bytes(32)
    assert opened().key == key
