"""DiskTier joins a DiskStore to the slots of the host tier: records are read into slots, and written from them.

The store knows digests alone. A block that lacks the records of some kinds of pools (`kinds.py`) has another content than a whole
one, so it is stored under another digest, which is derived from its own.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from engine.errors import InternalError
from engine.kvcache.disk.outcome import Outcome
from engine.kvcache.disk.store import DiskStore
from engine.kvcache.disk.workers import Kind
from engine.kvcache.disk.write_policy import Refusal
from engine.kvcache.identity import DIGEST_BYTES
from engine.kvcache.kinds import ALL
from engine.messages import TierStats
from engine.plan import HostSlots


class DiskRecord(NamedTuple):
    """A record that can be read."""

    slot: int  # of the store
    key: bytes  # digest under which the store has it
    mask: int  # kinds of pools whose records it holds


class DiskEnd(NamedTuple):
    """The end of a read or a write."""

    kind: Kind
    host_slot: int
    ok: bool


class DiskTier:
    """`inner` is the mask of published blocks that are not whole, or ALL if all blocks are. One thread calls all methods."""

    def __init__(self, store: DiskStore, host: HostSlots, inner: int = ALL) -> None:
        self._store = store
        self._host = host
        self._masks = (ALL,) if inner == ALL else (ALL, inner)
        self._host_slots: dict[tuple[Kind, int], int] = {}  # by move: its kind, and the slot of the store
        self.num_read = self.num_written = self.num_failed = 0  # reads and writes that have ended

    @property
    def store(self) -> DiskStore:
        """The store, to look at."""
        return self._store

    @property
    def is_on(self) -> bool:
        return self._store.health.is_on

    @property
    def is_looking(self) -> bool:
        """Return whether the disk is on, and records of earlier engines may not have been found yet."""
        return self.is_on and not self._store.is_scanned

    @property
    def is_idle(self) -> bool:
        """Return whether no read or write is under way."""
        return not self._host_slots

    @property
    def takes_reads(self) -> bool:
        """Return whether a further read can be begun now. While not, one must wait until some have ended."""
        return self._store.takes_reads

    def find(self, digest: bytes) -> DiskRecord | None:
        """Return the fullest record of this content that is not being read. `pin` it before any other call.

        A second read of one record could not be told from the first one by its end.
        """
        for mask in self._masks:
            key = _key(digest, mask)
            slot = self._store.find(key)
            if slot is not None and (Kind.READ, slot) not in self._host_slots:
                return DiskRecord(slot, key, mask)
        return None

    def has(self, digest: bytes, mask: int) -> bool:
        """Return whether a record with the kinds of `mask` is there or being written. If so, it counts as used."""
        for kept in self._masks:
            if kept & mask == mask and self._store.index.has(key := _key(digest, kept)):
                if (slot := self._store.find(key)) is not None:
                    self._store.index.touch(slot)
                return True
        return False

    def pin(self, record: DiskRecord) -> None:
        """Keep a record until it is read, or until `unpin`."""
        self._store.index.pin(record.slot)

    def unpin(self, record: DiskRecord) -> None:
        self._store.index.unpin(record.slot)

    def read(self, record: DiskRecord, host_slot: int) -> None:
        """Begin to read a pinned record into a slot of the host. Only while `takes_reads`."""
        if not self._store.submit_read(record.slot, record.key, self._host.record(host_slot)):
            raise InternalError("a read was begun that the disk tier does not take")
        self._host_slots[Kind.READ, record.slot] = host_slot

    def write(self, digest: bytes, family: bytes, mask: int, host_slot: int) -> Refusal | None:
        """Begin to write the content of a slot of the host. Returns why not, or None if it is being written."""
        key = _key(digest, mask)
        reserved = self._store.reserve(key, family)
        if isinstance(reserved, Refusal):
            return reserved
        if not self._store.submit_write(reserved.slot, key, family, self._host.record(host_slot)):
            return Refusal.BUSY
        self._host_slots[Kind.WRITE, reserved.slot] = host_slot
        return None

    def poll(self, seconds: float = 0.0) -> list[DiskEnd]:
        """Return the reads and writes that have ended. If there is none, wait up to `seconds` for one, or for other news."""
        ended = []
        for move in self._store.poll(seconds):
            ok = move.outcome is Outcome.OK
            self.num_read += ok and move.kind is Kind.READ
            self.num_written += ok and move.kind is Kind.WRITE
            self.num_failed += not ok
            ended.append(DiskEnd(move.kind, self._host_slots.pop((move.kind, move.slot)), ok))
        return ended

    def withdraw(self, family: bytes) -> None:
        """See to it that no present record of a family is ever read again."""
        self._store.forget_family(family)

    def clear(self) -> int:
        """See to it that no present record is ever read again. Returns how many there were."""
        num = len(self._store.index)
        self._store.forget_all()
        return num

    def stats(self) -> TierStats:
        """Return the figures of this tier, as far as it knows them."""
        store = self._store
        return TierStats(
            blocks_used=len(store.index),
            blocks_limit=store.files.sizes.num_slots,
            num_demoted=self.num_written,
            num_promoted=self.num_read,
            num_failed=self.num_failed,
            num_evicted=store.counts.evicted,
            num_dropped=store.counts.dropped.total(),
            promoted_bytes=self.num_read * self._host.record_bytes,
            demoted_bytes=self.num_written * self._host.record_bytes,
            num_on=int(self.is_on),
            outages={str(reason): num for reason, num in store.health.outages.items()},
        )

    def check(self) -> None:
        self._store.check()

    def close(self, seconds: float) -> None:
        """Finish what is under way, and release the folder, within `seconds`. See DiskStore."""
        self._store.close(seconds)


def _key(digest: bytes, mask: int) -> bytes:
    if mask == ALL:
        return digest
    return hashlib.blake2b(digest + mask.to_bytes(8, "little", signed=True), digest_size=DIGEST_BYTES).digest()
