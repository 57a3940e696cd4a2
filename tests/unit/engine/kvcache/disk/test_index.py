"""Tests which slot a record gets, which record goes first, and that a forgotten record stays forgotten."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.errors import InternalError
from engine.kvcache.disk.index import SlotIndex
from tests.support.disk_store import digest_of


def index_of(num_slots, *, found=()):
    """Return an index of `num_slots` slots, the first of which hold the records `found`: (number, stamp)."""
    index = SlotIndex()
    for slot, (number, stamp) in enumerate(found):
        index.add_found(slot, digest_of(number), stamp)
    index.add_free(range(len(found), num_slots))
    return index


def put(index, number):
    """Write the record of `number`, and return the digest that it evicts."""
    reserved = index.reserve(digest_of(number))
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
    assert index.reserve(digest_of(2)) is None
    index.unpin(index.find(digest_of(1)))
    assert put(index, 2) == digest_of(1)


def test_a_record_is_found_once_it_is_written():
    index = index_of(2)
    reserved = index.reserve(digest_of(0))
    assert index.find(digest_of(0)) is None
    assert index.reserve(digest_of(0)) is None
    assert len(index) == 0
    index.commit(reserved.slot)
    assert index.find(digest_of(0)) == reserved.slot
    assert len(index) == 1


def test_the_slot_of_a_failed_write_is_erased_before_it_is_used_again():
    index = index_of(1)
    slot = index.reserve(digest_of(0)).slot
    index.drop(slot)
    assert index.reserve(digest_of(1)) is None
    assert index.take_condemned() == [slot]
    assert index.take_condemned() == []
    index.erase_again(slot)
    assert index.take_condemned() == [slot]
    index.erased(slot)
    index.check()
    assert index.reserve(digest_of(1)).slot == slot


def test_a_record_is_forgotten_whatever_moves_with_it():
    index = index_of(3)
    put(index, 0)
    put(index, 1)
    being_read, being_written = index.find(digest_of(1)), index.reserve(digest_of(2)).slot
    index.pin(being_read)
    for number in range(3):
        index.forget(digest_of(number))
        assert index.find(digest_of(number)) is None
        index.check()
    assert index.take_condemned() == [0]
    index.unpin(being_read)
    index.commit(being_written)
    index.check()
    assert index.take_condemned() == [being_read, being_written]
    assert len(index) == 0


def test_a_record_that_is_forgotten_before_the_scan_finds_it_stays_so():
    index = index_of(0)
    index.forget(digest_of(0))
    index.add_found(0, digest_of(0), 1)
    assert index.find(digest_of(0)) is None
    assert index.take_condemned() == [0]
    index.end_scan()
    index.erased(0)
    assert put(index, 0) is None
    assert index.find(digest_of(0)) == 0


def test_of_two_records_of_one_digest_one_is_erased():
    index = index_of(0)
    index.add_found(0, digest_of(0), 1)
    index.add_found(1, digest_of(0), 2)
    index.check()
    assert index.take_condemned() == [1]


def test_after_a_reset_slots_in_transit_are_erased_at_the_end_of_their_moves():
    index = index_of(4)
    for number in range(3):
        put(index, number)
    being_read, being_written = index.find(digest_of(1)), index.reserve(digest_of(3)).slot
    index.pin(being_read)
    index.reset()
    index.check()
    assert len(index) == 0
    index.add_free(range(4))
    index.check()
    assert {index.reserve(digest_of(n)).slot for n in (10, 11)} == {0, 1, 2, 3} - {being_read, being_written}
    assert index.reserve(digest_of(12)) is None
    index.unpin(being_read)
    index.commit(being_written)
    index.check()
    assert index.take_condemned() == [being_read, being_written]
    assert index.find(digest_of(1)) is None


def test_a_retired_slot_is_not_used_again():
    index = index_of(1)
    index.drop(index.reserve(digest_of(0)).slot)
    index.retire(*index.take_condemned())
    index.add_unreadable(1)
    index.add_free([0, 1])
    index.check()
    assert (index.num_slots, index.num_retired) == (0, 2)
    assert index.reserve(digest_of(0)) is None


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


class AnyOrder(RuleBasedStateMachine):
    """Calls the index in any order that its contract allows, beside a model: digest -> slot of what can be found."""

    @initialize(num_slots=st.integers(1, 5))
    def begin(self, num_slots):
        self.index = index_of(num_slots)
        self.num_slots = num_slots
        self.model = {}
        self.writing = {}  # slot -> digest, or None if it was forgotten since
        self.reading = []

    @rule(number=st.integers(0, 7))
    def reserve(self, number):
        digest = digest_of(number)
        reserved = self.index.reserve(digest)
        if reserved is None:
            return
        assert digest not in self.model
        assert reserved.slot not in self.reading
        if reserved.evicted is not None:
            assert self.model.pop(reserved.evicted) == reserved.slot
        self.writing[reserved.slot] = digest

    @precondition(lambda self: self.writing)
    @rule(data=st.data(), is_ok=st.booleans())
    def end_write(self, data, is_ok):
        slot = data.draw(st.sampled_from(sorted(self.writing)))
        digest = self.writing.pop(slot)
        (self.index.commit if is_ok else self.index.drop)(slot)
        if is_ok and digest is not None:
            self.model[digest] = slot

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def begin_read(self, data):
        slot = self.index.find(data.draw(st.sampled_from(sorted(self.model))))
        self.index.pin(slot)
        self.reading.append(slot)

    @precondition(lambda self: self.reading)
    @rule(data=st.data(), is_ok=st.booleans())
    def end_read(self, data, is_ok):
        slot = data.draw(st.sampled_from(self.reading))
        if not is_ok:
            self.index.drop(slot)
            self.model = {digest: held for digest, held in self.model.items() if held != slot}
        self.index.unpin(slot)
        self.reading.remove(slot)

    @rule(number=st.integers(0, 7))
    def forget(self, number):
        digest = digest_of(number)
        self.index.forget(digest)
        self.model.pop(digest, None)
        self.writing = {slot: None if held == digest else held for slot, held in self.writing.items()}

    @rule()
    def erase(self):
        for slot in self.index.take_condemned():
            assert slot not in self.reading
            assert slot not in self.writing
            self.index.erased(slot)

    @rule()
    def lose_the_folder(self):
        self.index.reset()
        self.model.clear()
        self.writing = dict.fromkeys(self.writing)
        self.index.add_free(range(self.num_slots))

    @invariant()
    def agrees(self):
        self.index.check()
        assert self.index.num_slots == self.num_slots
        assert len(self.index) == len(self.model)
        for number in range(8):
            assert self.index.find(digest_of(number)) == self.model.get(digest_of(number))


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40)
