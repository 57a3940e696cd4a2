"""Calls the index of the disk tier in any order that its contract allows, with restarts: what was forgotten never comes back."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.kvcache.disk.index import SlotIndex
from tests.support.disk_store import digest_of, family_of


class AnyOrder(RuleBasedStateMachine):
    """Keeps a model: digest -> slot of what can be found.

    `disk` is what a scan would find in each slot: the number of the block and that of the write, or None. `taboo` has the writes
    whose records were forgotten.
    """

    @initialize(num_slots=st.integers(1, 5))
    def begin(self, num_slots):
        self.index = SlotIndex()
        self.index.add_free(range(num_slots))
        self.index.end_scan()
        self.num_slots = num_slots
        self.model = {}
        self.writing = {}  # slot -> number of the block, that of the write, and whether its record is lost
        self.reading = []
        self.disk = dict.fromkeys(range(num_slots))
        self.taboo = set()
        self.num_writes = 0

    @rule(number=st.integers(0, 7))
    def reserve(self, number):
        reserved = self.index.reserve(digest_of(number), family_of(number))
        if reserved is None:
            return
        assert digest_of(number) not in self.model
        assert reserved.slot not in self.reading
        if reserved.evicted is not None:
            assert self.model.pop(reserved.evicted) == reserved.slot
        self.num_writes += 1
        self.writing[reserved.slot] = (number, self.num_writes, False)

    @precondition(lambda self: self.writing)
    @rule(data=st.data(), is_ok=st.booleans())
    def end_write(self, data, is_ok):
        slot = data.draw(st.sampled_from(sorted(self.writing)))
        number, written, is_lost = self.writing.pop(slot)
        (self.index.commit if is_ok else self.index.drop)(slot)
        if is_ok:
            self.disk[slot] = (number, written)
            if not is_lost:
                self.model[digest_of(number)] = slot

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

    @rule(first=st.sampled_from([0, 4]))
    def forget_family(self, first):
        self.index.forget_family(family_of(first))
        self.forget(range(first, first + 4))

    @rule()
    def forget_all(self):
        self.index.forget_all()
        self.forget(range(8))

    def forget(self, numbers):
        on_disk = [held for held in self.disk.values() if held is not None]
        on_their_way = [(number, written) for number, written, _ in self.writing.values()]
        self.taboo.update(written for number, written in on_disk + on_their_way if number in numbers)
        for number in numbers:
            self.model.pop(digest_of(number), None)
        for slot, (number, written, is_lost) in self.writing.items():
            self.writing[slot] = (number, written, is_lost or number in numbers)

    @rule(limit=st.integers(1, 5))
    def erase(self, limit):
        slots = self.index.take_condemned()
        for slot in slots[:limit]:
            assert slot not in self.reading
            assert slot not in self.writing
            self.disk[slot] = None
            self.index.erased(slot)
        for slot in slots[limit:]:
            self.index.erase_again(slot)

    @rule(is_gone=st.booleans())
    def lose_the_folder(self, is_gone):
        """The next scan finds other files, which are empty, or the same at another mount."""
        self.index.reset()
        if is_gone:
            self.disk = dict.fromkeys(self.disk)
        self.writing = {slot: (number, written, True) for slot, (number, written, _) in self.writing.items()}
        self.scan()

    @rule()
    def restart(self):
        for slot in self.index.doomed:
            self.disk[slot] = None
        self.index = SlotIndex()
        self.writing, self.reading = {}, []
        self.scan()

    def scan(self):
        for slot, held in self.disk.items():
            if held is None:
                self.index.add_free([slot])
            else:
                number, written = held
                self.index.add_found(slot, digest_of(number), family_of(number), written)
        self.index.end_scan()
        found = {digest_of(number): self.index.find(digest_of(number)) for number in range(8)}
        self.model = {digest: slot for digest, slot in found.items() if slot is not None}

    @invariant()
    def agrees(self):
        self.index.check()
        assert self.index.num_slots == self.num_slots
        assert len(self.index) == len(self.model)
        for number in range(8):
            slot = self.index.find(digest_of(number))
            assert slot == self.model.get(digest_of(number))
            if slot is not None:
                held, written = self.disk[slot]
                assert held == number
                assert written not in self.taboo


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40)
