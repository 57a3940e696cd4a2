"""Saves: which blocks are to be written to the disk tier, and how far each of them is.

    wanted      the block was matched by a second request, or belongs to a request that has finished
    arriving    the host lacks it, so it is copied there from the device
    ready       it has arrived in the host, and is written before others are copied
    writing     the disk tier writes it from the host, whose slot is pinned meanwhile

A block that is nowhere any more when its turn comes is not saved. Nothing waits for a save.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from engine.kvcache.chain import Entry
from engine.kvcache.disk.write_policy import Refusal
from engine.kvcache.disk_tier import DiskTier
from engine.kvcache.host_tier import HostTier, Slot
from engine.kvcache.moves import MoveList
from engine.kvcache.prefix import PrefixIndex
from engine.plan import gpu

MAX_WANTED = 1 << 16
MAX_AT_ONCE = 64  # blocks that one call looks at
MAX_ARRIVING = 64  # copies from the device to the host at a time
PAUSE_SECONDS = 0.01  # after a refusal, until the store is asked again


class Saves:
    def __init__(self, index: PrefixIndex, host: HostTier, disk: DiskTier, moves: MoveList) -> None:
        self._index = index
        self._host = host
        self._disk = disk
        self._moves = moves
        self._wanted: OrderedDict[bytes, bytes] = OrderedDict()  # digest -> family
        self._arriving: dict[bytes, bytes] = {}
        self._ready: OrderedDict[bytes, bytes] = OrderedDict()
        self._writing: dict[int, Slot] = {}  # by the host's slot number
        self._ask_at = 0.0
        self.num_dropped = 0  # wanted blocks that were not written

    def __len__(self) -> int:
        """Return how many blocks are to be written and are not written yet."""
        return len(self._wanted) + len(self._arriving) + len(self._ready) + len(self._writing)

    def want(self, digests: Sequence[bytes], family: bytes) -> None:
        """Ask for the published blocks of a prefix to be written, and count those that are on disk as used.

        If too many are wanted, those at the end of the prefix are not saved: they are of no use without its beginning.
        """
        missing = [digest for digest in reversed(digests) if self._is_missing(digest)]
        room = MAX_WANTED - len(self._wanted)
        for digest in missing[::-1][:room]:
            self._wanted[digest] = family
        self.num_dropped += max(0, len(missing) - room)

    def advance(self, now: float, *, has_news: bool) -> None:
        """Begin some of the saves that are wanted. After a refusal, that has to wait for news of the disk, or for a while."""
        if not self._disk.is_on or (now < self._ask_at and not has_news):
            return
        for _ in range(MAX_AT_ONCE):
            queue = self._ready or self._wanted
            if not queue:
                return
            digest, family = next(iter(queue.items()))
            if not self._begin(digest, family):
                self._ask_at = now + PAUSE_SECONDS
                return
            del queue[digest]

    def host_arrived(self, digest: bytes, *, ok: bool) -> None:
        """Note that content has arrived in the host, or failed to."""
        family = self._arriving.pop(digest, None)
        if family is None:
            return
        if ok:
            self._ready[digest] = family
            self._ask_at = 0.0
        else:
            self.num_dropped += 1

    def written(self, host_slot: int, *, ok: bool) -> None:
        """Note the end of a write from a slot of the host."""
        self._host.unpin(self._writing.pop(host_slot))
        self.num_dropped += not ok

    def withdraw(self, family: bytes) -> None:
        """Want no block of a family any more, because their content may be wrong."""
        for blocks in (self._wanted, self._arriving, self._ready):
            for digest in [digest for digest, other in blocks.items() if other == family]:
                del blocks[digest]

    def clear(self) -> None:
        """Want nothing any more. What is being written is still written."""
        for blocks in (self._wanted, self._arriving, self._ready):
            blocks.clear()

    def _is_missing(self, digest: bytes) -> bool:
        """Return whether a block is published, not on its way to the disk and not there. If it is there, it counts as used."""
        entry = self._index.find(digest)
        if entry is None or digest in self._wanted or digest in self._arriving or digest in self._ready:
            return False
        return not self._disk.has(digest, self._index.mask(entry.block))

    def _begin(self, digest: bytes, family: bytes) -> bool:
        """Begin to save a block, or find that it cannot be. Returns False if it must be tried again later."""
        entry = self._index.find(digest)
        if not self._host.touch(digest, 0 if entry is None else self._index.mask(entry.block)):
            return self._copy_to_host(digest, family, entry)
        slot = self._host.find(digest)
        if slot is None:  # it is on its way to the host
            self._arriving[digest] = family
            return True
        if slot.number in self._writing:  # the record that is being written was forgotten meanwhile
            return False
        refusal = self._disk.write(digest, family, slot.mask, slot.number)
        if refusal is None:
            self._host.pin(slot)
            self._writing[slot.number] = slot
        return refusal in (None, Refusal.PRESENT)

    def _copy_to_host(self, digest: bytes, family: bytes, entry: Entry | None) -> bool:
        if entry is None:
            self.num_dropped += 1
            return True
        if len(self._arriving) >= MAX_ARRIVING:
            return False
        slot = self._host.take(digest, family, self._index.mask(entry.block))
        if slot is None:
            return False
        self._moves.move(gpu(entry.block), self._host.place(slot))
        self._arriving[digest] = family
        return True
