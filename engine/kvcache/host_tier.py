"""HostTier: which blocks the slots of the host memory hold, and which of them makes room for the next one.

    free      the slot holds nothing
    idle      its content is found by the digest; the least recently used idle slot is the next to be overwritten
    moving    a move writes or reads it, so it is pinned; its content is found once it has arrived
    private   it is pinned for one request, and no digest leads to its content

The tier knows digests and slot numbers only. `lower_tiers.py` decides what is moved, and the runner or the disk tier moves it.
`host_memory.py` has the memory.
"""

from __future__ import annotations

from collections import OrderedDict

import msgspec

from engine.errors import InternalError
from engine.kvcache.kinds import ALL
from engine.plan import Place, Tier

PRIVATE = b""  # in place of the digest of a slot that no digest leads to


class Slot(msgspec.Struct, gc=False, eq=False):
    """Describes the content of one slot."""

    number: int
    digest: bytes
    family: bytes  # digest of the first block of the prefix
    mask: int  # kinds of pools whose records it holds
    pins: int = 0  # moves that write or read the slot now
    ready: bool = False  # the content has arrived
    listed: bool = True  # the content counts; if not, the slot becomes free once no move needs it


class HostTier:
    """Holds at most `num_slots` blocks. All operations are O(1), except `withdraw`, `clear` and `check`."""

    __slots__ = ("_by_digest", "_free", "_idle", "_moving", "_num_private", "num_evicted", "num_slots")

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_evicted = 0  # blocks whose content was overwritten by another, since the start
        self._free = list(range(num_slots - 1, -1, -1))
        self._by_digest: dict[bytes, Slot] = {}  # the listed slots
        self._idle: OrderedDict[bytes, Slot] = OrderedDict()  # listed slots that no move needs, least recently used first
        self._moving: dict[int, Slot] = {}  # and the private ones
        self._num_private = 0

    def __len__(self) -> int:
        return len(self._by_digest) + self._num_private

    def find(self, digest: bytes) -> Slot | None:
        """Return the slot with this content, if the content has arrived."""
        slot = self._by_digest.get(digest)
        return slot if slot is not None and slot.ready else None

    def has(self, digest: bytes) -> bool:
        """Return whether a slot has this content, or is about to get it."""
        return digest in self._by_digest

    def moving(self, number: int) -> Slot:
        """Return a pinned slot."""
        return self._moving[number]

    def touch(self, digest: bytes, mask: int) -> bool:
        """Note that content with the records of `mask` was used. Returns False if the tier does not have all of them, and is not
        about to get them. Content that lacks some of them is forgotten."""
        slot = self._by_digest.get(digest)
        if slot is None:
            return False
        if slot.mask & mask != mask:
            self.drop(slot)
            return False
        if not slot.pins:
            self._idle.move_to_end(digest)
        return True

    def take(self, digest: bytes, family: bytes, mask: int) -> Slot | None:
        """Return a pinned slot for content that the tier does not have. Returns None if all slots are pinned.

        The least recently used content is lost if no slot is free.
        """
        number = self._take_number()
        if number is None:
            return None
        slot = self._by_digest[digest] = self._moving[number] = Slot(number, digest, family, mask, pins=1)
        return slot

    def take_private(self) -> Slot | None:
        """Return a pinned slot for content that nobody finds. It becomes free with its last pin. Returns None like `take`."""
        number = self._take_number()
        if number is None:
            return None
        self._num_private += 1
        slot = self._moving[number] = Slot(number, PRIVATE, PRIVATE, ALL, pins=1, listed=False)
        return slot

    def pin(self, slot: Slot) -> None:
        """Keep the content of `slot` until `unpin` is called as often."""
        self._idle.pop(slot.digest, None)
        self._moving[slot.number] = slot
        slot.pins += 1

    def unpin(self, slot: Slot) -> None:
        """End one move that needs `slot`. Without any, the slot is the most recently used one, or free."""
        slot.pins -= 1
        if slot.pins:
            return
        del self._moving[slot.number]
        if slot.listed:
            self._idle[slot.digest] = slot
        else:
            self._free.append(slot.number)
            self._num_private -= slot.digest == PRIVATE

    def arrived(self, number: int, *, ok: bool) -> None:
        """End the move that writes slot `number`. If it failed, the slot holds nothing."""
        slot = self._moving[number]
        slot.ready = True
        if not ok:
            self.drop(slot)
        self.unpin(slot)

    def drop(self, slot: Slot) -> None:
        """Forget the content of a slot, because it may be wrong."""
        if not slot.listed:
            return
        slot.listed = False
        del self._by_digest[slot.digest]
        if self._idle.pop(slot.digest, None) is not None:
            self._free.append(slot.number)

    def withdraw(self, family: bytes) -> None:
        """Forget all contents of a family, because they may be wrong. The cost grows with the size of the tier."""
        for slot in [slot for slot in self._by_digest.values() if slot.family == family]:
            self.drop(slot)

    def clear(self) -> int:
        """Forget all contents, those included that are on their way. Returns how many there were."""
        slots = list(self._by_digest.values())
        for slot in slots:
            self.drop(slot)
        return len(slots)

    def place(self, slot: Slot) -> Place:
        return Place(Tier.HOST, slot.number)

    def _take_number(self) -> int | None:
        """Return the number of a slot whose content may be overwritten. Returns None if all slots are pinned."""
        if self._free:
            return self._free.pop()
        if not self._idle:
            return None
        _, old = self._idle.popitem(last=False)
        del self._by_digest[old.digest]
        self.num_evicted += 1
        return old.number

    def check(self) -> None:
        """Raise InternalError unless each slot is free, idle or moving, once, and is found by its digest if it is listed."""
        numbers = sorted([*self._free, *(slot.number for slot in self._idle.values()), *self._moving])
        if numbers != list(range(self.num_slots)):
            raise InternalError(f"the host tier: slots are lost, listed twice, or more than {self.num_slots}")
        for slot in [*self._idle.values(), *self._moving.values()]:
            if slot.listed != (self._by_digest.get(slot.digest) is slot):
                raise InternalError(f"the host tier: slot {slot.number} is not found by its digest, or though it is dropped")
        if any(slot.pins or not slot.ready or not slot.listed for slot in self._idle.values()):
            raise InternalError("the host tier: an idle slot is pinned or without content")
        if any(slot.pins < 1 or self._moving[number].number != number for number, slot in self._moving.items()):
            raise InternalError("the host tier: a moving slot is not pinned")
        if len(self._by_digest) > len(self._idle) + len(self._moving):
            raise InternalError("the host tier: a digest leads to a slot that is neither idle nor moving")
        if self._num_private != sum(slot.digest == PRIVATE for slot in self._moving.values()):
            raise InternalError("the host tier: the number of private slots is wrong")
