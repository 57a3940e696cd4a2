"""Tests which slot a record gets, which record goes first, and that a forgotten record stays forgotten."""

import pytest

from engine.errors import InternalError
from engine.kvcache.disk.index import SlotIndex
from tests.support.disk_store import digest_of, family_of


def index_of(num_slots, *, found=()):
    """Return an index of `num_slots` slots, the first of which hold the records `found`: (number, stamp)."""
    index = SlotIndex()
    for slot, (number, stamp) in enumerate(found):
        index.add_found(slot, digest_of(number), family_of(number), stamp)
    index.add_free(range(len(found), num_slots))
    return index


def reserve(index, number):
    return index.reserve(digest_of(number), family_of(number))


def put(index, number):
    """Write the record of `number`, and return the digest that it evicts."""
    reserved = reserve(index, number)
    index.commit(reserved.slot)
    index.check()
    return reserved.evicted


def test_the_least_recently_used_record_goes_first():
    index = index_of(3)
    assert [put(index, number) for number in range(3)] == [None] * 3
    index.touch(index.find(digest_of(0)))
    assert [put(index, number) for number in (3, 4, 5)] == [digest_of(1), digest_of(2), digest_of(0)]


def test_records_of_earlier_runs_go_before_those_of_this_one_in_the_order_of_their_writes():
    index = index_of(5, found=[(0, 30), (1, 10), (2, 40), (3, 20)])
    assert put(index, 9) is None
    slot = index.find(digest_of(1))
    index.pin(slot)
    index.unpin(slot)
    assert [put(index, number) for number in range(10, 15)] == [digest_of(n) for n in (3, 0, 2, 9, 1)]


def test_a_pinned_record_is_not_evicted():
    index = index_of(2)
    put(index, 0)
    put(index, 1)
    for number in (0, 1):
        index.pin(index.find(digest_of(number)))
    assert reserve(index, 2) is None
    index.unpin(index.find(digest_of(1)))
    assert put(index, 2) == digest_of(1)


def test_a_record_is_found_once_it_is_written():
    index = index_of(2)
    reserved = reserve(index, 0)
    assert index.find(digest_of(0)) is None
    assert reserve(index, 0) is None
    assert len(index) == 0
    index.commit(reserved.slot)
    assert index.find(digest_of(0)) == reserved.slot
    assert len(index) == 1


def test_the_slot_of_a_failed_write_is_erased_before_it_is_used_again():
    index = index_of(1)
    slot = reserve(index, 0).slot
    index.drop(slot)
    assert reserve(index, 1) is None
    assert index.take_condemned() == [slot]
    assert index.take_condemned() == []
    index.erase_again(slot)
    assert index.take_condemned() == [slot]
    index.erased(slot)
    index.check()
    assert reserve(index, 1).slot == slot


def test_a_family_is_forgotten_whatever_moves_with_it():
    index = index_of(5)
    for number in (0, 1, 4):
        put(index, number)
    being_read, being_written = index.find(digest_of(1)), reserve(index, 2).slot
    index.pin(being_read)
    assert not index.is_forgotten(being_read)
    index.forget_family(family_of(0))
    index.check()
    assert [index.find(digest_of(number)) is None for number in (0, 1, 2, 4)] == [True, True, True, False]
    assert index.take_condemned() == [0]
    assert index.is_forgotten(being_read)
    assert index.is_forgotten(being_written)
    index.unpin(being_read)
    index.commit(being_written)
    index.check()
    assert index.take_condemned() == [being_read, being_written]
    assert len(index) == 1


def test_everything_is_forgotten_whatever_moves_with_it():
    index = index_of(4)
    put(index, 0)
    put(index, 4)
    being_read, being_written = index.find(digest_of(4)), reserve(index, 8).slot
    index.pin(being_read)
    index.forget_all()
    index.check()
    assert index.is_forgotten(being_read)
    assert index.is_forgotten(being_written)
    index.unpin(being_read)
    index.commit(being_written)
    assert sorted(index.take_condemned()) == [0, being_read, being_written]
    assert len(index) == 0


@pytest.mark.parametrize("is_all", [False, True])
def test_a_record_that_is_forgotten_before_the_scan_finds_it_stays_so(is_all):
    index = index_of(0)
    assert not index.is_seeking
    if is_all:
        index.forget_all()
    else:
        index.forget_family(family_of(0))
    assert index.is_seeking
    index.add_found(0, digest_of(1), family_of(1), 1)
    index.add_found(1, digest_of(4), family_of(4), 1)
    assert index.find(digest_of(1)) is None
    assert index.take_condemned() == ([0, 1] if is_all else [0])
    index.end_scan()
    assert not index.is_seeking
    index.erased(0)
    assert put(index, 1) is None
    assert index.find(digest_of(1)) == 0


def test_a_forgotten_record_that_was_not_erased_stays_so_when_the_files_are_mounted_again():
    index = index_of(2)
    index.end_scan()
    put(index, 0)
    index.forget_family(family_of(0))
    for _ in range(2):
        index.reset()
        index.add_found(0, digest_of(0), family_of(0), 1)
        index.end_scan()
        assert index.find(digest_of(0)) is None
        assert index.take_condemned() == [0]


def test_an_evicted_record_that_is_forgotten_before_another_is_written_in_its_place_stays_so():
    index = index_of(1)
    index.end_scan()
    put(index, 0)
    slot = reserve(index, 4).slot
    index.forget_family(family_of(0))
    index.drop(slot)
    index.reset()
    index.add_found(slot, digest_of(0), family_of(0), 1)
    assert index.find(digest_of(0)) is None


def test_a_family_that_was_erased_is_found_again_when_it_is_written_anew():
    index = index_of(2)
    index.end_scan()
    put(index, 0)
    index.forget_family(family_of(0))
    index.erased(*index.take_condemned())
    put(index, 0)
    index.reset()
    index.add_found(1, digest_of(0), family_of(0), 2)
    assert index.find(digest_of(0)) == 1


def test_a_slot_that_could_not_be_erased_is_tried_again_at_the_end():
    index = index_of(2)
    put(index, 0)
    index.forget_family(family_of(0))
    index.retire(*index.take_condemned())
    index.check()
    assert index.doomed == {0}


def test_a_slot_that_could_not_be_read_is_erased_at_the_end_if_it_may_hold_a_forgotten_record():
    index = index_of(0)
    index.add_unreadable(0)
    assert index.doomed == set()
    index.forget_family(family_of(0))
    index.add_unreadable(1)
    index.end_scan()
    index.check()
    assert index.doomed == {0, 1}


def test_of_two_records_of_one_digest_one_is_erased():
    index = index_of(0)
    index.add_found(0, digest_of(0), family_of(0), 1)
    index.add_found(1, digest_of(0), family_of(0), 2)
    index.check()
    assert index.take_condemned() == [1]


def test_after_a_reset_slots_in_transit_are_erased_at_the_end_of_their_moves():
    index = index_of(4)
    for number in range(3):
        put(index, number)
    being_read, being_written = index.find(digest_of(1)), reserve(index, 3).slot
    index.pin(being_read)
    index.reset()
    index.check()
    assert len(index) == 0
    index.add_free(range(4))
    index.check()
    assert {reserve(index, n).slot for n in (10, 11)} == {0, 1, 2, 3} - {being_read, being_written}
    assert reserve(index, 12) is None
    index.unpin(being_read)
    index.commit(being_written)
    index.check()
    assert index.take_condemned() == [being_read, being_written]
    assert index.find(digest_of(1)) is None


def test_a_retired_slot_is_not_used_again():
    index = index_of(1)
    index.drop(reserve(index, 0).slot)
    index.retire(*index.take_condemned())
    index.add_unreadable(1)
    index.add_free([0, 1])
    index.check()
    assert (index.num_slots, index.num_retired) == (0, 2)
    assert reserve(index, 0) is None


def test_one_unpin_too_many_is_an_error():
    index = index_of(1)
    put(index, 0)
    with pytest.raises(InternalError, match="more often"):
        index.unpin(0)


def test_check_finds_a_slot_with_two_states():
    index = index_of(2)
    put(index, 0)
    index._free.append(0)
    with pytest.raises(InternalError, match="two states"):
        index.check()


def test_check_finds_a_digest_without_its_slot():
    index = index_of(2)
    put(index, 0)
    index._slots.clear()
    with pytest.raises(InternalError, match="digests"):
        index.check()


def test_check_finds_a_record_that_could_never_be_evicted():
    index = index_of(2)
    put(index, 0)
    index._order.clear()
    with pytest.raises(InternalError, match="order"):
        index.check()


def test_check_finds_a_free_slot_that_may_hold_a_forgotten_record():
    index = index_of(2)
    index._forgotten.add(family_of(0), [1])
    with pytest.raises(InternalError, match="forgotten"):
        index.check()
