"""SlotIndex: which slot of the disk tier holds which record. One thread uses it, and it does no I/O.

    free        holds no record; is taken first
    reserved    its record is being written, and can be found once it is committed
    kept        its record can be found; it may be evicted while nobody has it pinned
    condemned   may hold a record that must not be found again; becomes free once it is erased on disk
    retired     cannot be written, and is not used again

A free slot never holds a whole record. Otherwise a forgotten record could come back after a restart.

A record has a digest and a family: the digest of the first block of its prefix. Records are forgotten by families.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from engine.errors import InternalError
from engine.kvcache.disk.forgotten import Forgotten
from engine.kvcache.disk.order import EvictionOrder


@dataclass(slots=True)
class _Record:
    digest: bytes
    family: bytes
    pins: int = 0


@dataclass(frozen=True, slots=True)
class Reserved:
    """A slot for a new record, and the digest of the record that the slot held until now."""

    slot: int
    evicted: bytes | None


class SlotIndex:
    """Reserved and pinned slots are in transit: they belong to a move, which ends with `commit`, `drop` or `unpin`."""

    def __init__(self) -> None:
        self._free: deque[int] = deque()
        self._reserved: dict[int, _Record] = {}
        self._kept: dict[int, _Record] = {}
        self._condemned: set[int] = set()
        self._retired: set[int] = set()
        self._known: set[int] = set()  # all slots of the five states
        self._slots: dict[bytes, int] = {}  # where a digest is reserved or kept
        self._order = EvictionOrder()  # kept slots that are not pinned
        self._lost: set[int] = set()  # slots in transit that are condemned at the end of the move
        self._to_erase: list[int] = []  # condemned slots that `take_condemned` has not returned
        self._forgotten = Forgotten()

    def __len__(self) -> int:
        """Return how many records can be found."""
        return len(self._slots) - sum(1 for slot in self._reserved if slot not in self._lost)

    @property
    def num_slots(self) -> int:
        """Return how many slots can hold records."""
        return len(self._known) - len(self._retired)

    @property
    def num_reserved(self) -> int:
        return len(self._reserved)

    @property
    def condemned(self) -> frozenset[int]:
        """Return the slots that wait to be erased on disk."""
        return frozenset(self._condemned)

    @property
    def doomed(self) -> frozenset[int]:
        """Return the slots that may hold a record that must not be found after a restart. All submitted moves have ended."""
        return frozenset(self._condemned | self._lost | self._reserved.keys() | self._forgotten.slots)

    @property
    def is_seeking(self) -> bool:
        """Return whether the rest of a scan may find a forgotten record."""
        return self._forgotten.is_seeking

    @property
    def num_retired(self) -> int:
        return len(self._retired)

    def find(self, digest: bytes) -> int | None:
        """Return the slot whose record can be read, or None."""
        slot = self._slots.get(digest)
        return slot if slot in self._kept else None

    def has(self, digest: bytes) -> bool:
        """Return whether the digest has a slot, kept or reserved."""
        return digest in self._slots

    def is_forgotten(self, slot: int) -> bool:
        """Return whether the record of a slot in transit was forgotten since the slot was reserved or pinned."""
        record = self._reserved.get(slot) or self._kept[slot]
        return slot in self._lost and record.family in self._forgotten

    def reserve(self, digest: bytes, family: bytes) -> Reserved | None:
        """Take a slot for a new record: a free one, or the least recently used one that is not pinned.

        Returns None if the digest has a slot already, or if all slots are in use.
        """
        if digest in self._slots:
            return None
        evicted = None
        slot = self._free.popleft() if self._free else self._order.pop()
        if slot is None:
            return None
        if slot in self._kept:
            evicted = self._kept.pop(slot).digest
            del self._slots[evicted]
        self._reserved[slot] = _Record(digest, family)
        self._slots[digest] = slot
        return Reserved(slot, evicted)

    def commit(self, slot: int) -> None:
        """Make the record of a reserved slot findable: it is written."""
        record = self._reserved.pop(slot)
        if slot in self._lost:
            self._condemn(slot)
            return
        self._kept[slot] = record
        self._order.use(slot)
        self._forgotten.overwritten(slot)

    def drop(self, slot: int) -> None:
        """Give up the record of a reserved or kept slot: its write failed, or it cannot be read. A pin is not taken back."""
        if slot in self._lost:
            if self._reserved.pop(slot, None) is not None:
                self._condemn(slot)
        elif slot in self._reserved:
            del self._slots[self._reserved.pop(slot).digest]
            self._condemn(slot)
        else:
            self._lose(slot)

    def pin(self, slot: int) -> None:
        """Keep the record of a kept slot from being evicted, until `unpin` was called as often as `pin`."""
        self._kept[slot].pins += 1
        self._order.remove(slot)

    def unpin(self, slot: int) -> None:
        """Take back one `pin`. The record counts as used."""
        kept = self._kept[slot]
        if kept.pins == 0:
            raise InternalError(f"disk slot {slot} was unpinned more often than pinned")
        kept.pins -= 1
        if kept.pins == 0 and slot in self._lost:
            del self._kept[slot]
            self._condemn(slot)
        elif kept.pins == 0:
            self._order.use(slot)

    def touch(self, slot: int) -> None:
        """Make the record of a kept slot the most recently used one."""
        if not self._kept[slot].pins:
            self._order.use(slot)

    def forget_family(self, family: bytes) -> None:
        """See to it that no present record of `family` is ever found again, after a restart neither.

        The cost grows with the size of the index.
        """
        self._lose_all(lambda record: record.family == family)
        self._forgotten.add(family, self._unsure())

    def forget_all(self) -> None:
        """See to it that no present record is ever found again, after a restart neither."""
        self._lose_all(lambda _: True)
        self._forgotten.add_all(self._unsure())

    def add_free(self, slots: Iterable[int]) -> None:
        """Add slots in which a scan found no record. A slot that has a state already keeps it."""
        new = [slot for slot in slots if slot not in self._known]
        self._free.extend(new)
        self._known.update(new)

    def add_found(self, slot: int, digest: bytes, family: bytes, stamp: int) -> None:
        """Add a slot in which a scan found the header of a record. The second record of a digest is condemned."""
        if slot in self._known:
            return
        self._known.add(slot)
        if family in self._forgotten:
            self._forgotten.found(slot)
            self._condemn(slot)
            return
        if digest in self._slots:
            self._condemn(slot)
            return
        self._kept[slot] = _Record(digest, family)
        self._slots[digest] = slot
        self._order.add_unused(slot, stamp)

    def add_unreadable(self, slot: int) -> None:
        """Add a slot that a scan could not read, and take it out of use."""
        if slot not in self._known:
            self._known.add(slot)
            self._retired.add(slot)
            if self._forgotten.is_seeking:
                self._forgotten.found(slot)

    def end_scan(self) -> None:
        self._forgotten.end_scan()

    def take_condemned(self) -> list[int]:
        """Return the slots that are to be erased on disk. Each is returned once, unless `erase_again` gives it back."""
        slots, self._to_erase = self._to_erase, []
        return slots

    def erase_again(self, slot: int) -> None:
        """Note that a condemned slot could not be erased now."""
        if slot in self._condemned:
            self._to_erase.append(slot)

    def erased(self, slot: int) -> None:
        """Make a condemned slot free."""
        if slot in self._condemned:
            self._condemned.remove(slot)
            self._free.append(slot)
            self._forgotten.overwritten(slot)

    def retire(self, slot: int) -> None:
        """Take a condemned slot out of use, because it cannot be erased."""
        if slot in self._condemned:
            self._condemned.remove(slot)
            self._retired.add(slot)

    def reset(self) -> None:
        """Remove everything, since the files are gone. Slots in transit stay so, and are condemned at the end of their moves.

        What is forgotten stays so, since the next scan may find the same files at another mount.
        """
        self._lost = set(self._reserved) | {slot for slot, kept in self._kept.items() if kept.pins}
        self._kept = {slot: kept for slot, kept in self._kept.items() if kept.pins}
        self._known = set(self._lost)
        for state in (self._free, self._condemned, self._retired, self._slots, self._order, self._to_erase):
            state.clear()
        self._forgotten.begin_scan(self._lost)

    def check(self) -> None:
        """Raise InternalError unless each slot has one state, each digest one slot, and each unpinned slot one place."""
        states = [set(self._free), set(self._reserved), set(self._kept), self._condemned, self._retired]
        if set().union(*states) != self._known or len(self._free) + sum(map(len, states[1:])) != len(self._known):
            raise InternalError("a disk slot has two states, or none")
        held = [(record.digest, slot) for slot, record in self._held() if slot not in self._lost]
        if dict(held) != self._slots or len(held) != len(self._slots):
            raise InternalError("the digests of the disk index differ from those of its slots")
        unpinned = {slot for slot, kept in self._kept.items() if not kept.pins}
        if set(self._order) != unpinned or len(self._order) != len(unpinned):
            raise InternalError("the order of the disk index differs from the slots that may be evicted")
        in_transit = self._reserved.keys() | (self._kept.keys() - unpinned)
        if not self._lost <= in_transit or not self._condemned.issuperset(self._to_erase):
            raise InternalError("a disk slot is to be erased while it is in use")
        if not self._forgotten.slots <= self._unsure():
            raise InternalError("a disk slot that can be read or is free may hold a forgotten record")
        self._order.check()

    def _held(self) -> Iterator[tuple[int, _Record]]:
        yield from self._kept.items()
        yield from self._reserved.items()

    def _unsure(self) -> set[int]:
        """Return the scanned slots that may hold another record on disk than the one that can be found, if any."""
        return self._condemned | self._lost | self._reserved.keys() | self._retired

    def _lose_all(self, is_meant: Callable[[_Record], bool]) -> None:
        for slot, record in list(self._held()):
            if slot in self._lost or not is_meant(record):
                continue
            if slot in self._reserved:
                del self._slots[record.digest]
                self._lost.add(slot)
            else:
                self._lose(slot)

    def _lose(self, slot: int) -> None:
        """Remove a kept slot's digest, and condemn the slot now or at the end of the last move that has it pinned."""
        kept = self._kept[slot]
        del self._slots[kept.digest]
        if kept.pins:
            self._lost.add(slot)
            return
        del self._kept[slot]
        self._order.remove(slot)
        self._condemn(slot)

    def _condemn(self, slot: int) -> None:
        self._lost.discard(slot)
        self._condemned.add(slot)
        self._to_erase.append(slot)
