"""Loads: the GPU blocks that are held for waiting requests while, and after, the rest of a prefix comes from lower tiers.

    blocks of a load   [ were on the GPU ... | come from the host or the disk ... ]
                         published             published once all of them have arrived

    a block comes      from the host: one move
                       from the disk: queued until the host has a slot, and the disk a place in its queue | read | moved on

The blocks are held, so nobody can take them before the request is admitted. If a read or a move fails, its block and all behind
it are given up, and the request computes them. If the request ends meanwhile, blocks into which something is being moved stay
held until it has arrived. Reads that nobody waits for any more end in the host.

A request loads once. If its load gave up all blocks, it remains one that holds none, until the request is admitted: otherwise the
request would wait for the same disk again and again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from engine.errors import InternalError
from engine.kvcache.disk_tier import DiskRecord, DiskTier
from engine.kvcache.host_tier import HostTier, Slot
from engine.kvcache.link import Link
from engine.kvcache.load import Load, Source
from engine.kvcache.moves import MoveList
from engine.kvcache.pool import BlockPool
from engine.kvcache.prefix import PrefixIndex
from engine.plan import Tier, gpu
from engine.request import Request


class Loads:
    """Keeps the loads of a pool."""

    def __init__(
        self,
        pool: BlockPool,
        index: PrefixIndex,
        host: HostTier,
        moves: MoveList,
        disk: DiskTier | None,
        clock: Callable[[], float],
    ) -> None:
        self.host_link, self.disk_link = Link(), Link()
        self._clock = clock
        self._pool = pool
        self._index = index
        self._host = host
        self._moves = moves
        self._disk = disk
        self._by_request: dict[Request, Load] = {}
        self._by_block: dict[int, tuple[Load, int]] = {}  # blocks into which content is moved
        self._by_slot: dict[int, tuple[Load, int]] = {}  # slots of the host into which content is read for a load
        self._digests: set[bytes] = set()  # contents that are queued, read or moved
        self._queues: deque[Load] = deque()  # loads with queued blocks

    def __contains__(self, request: Request) -> bool:
        """Return whether a load was begun for a waiting request."""
        return request in self._by_request

    @property
    def num_waiting(self) -> int:
        """Return how many waiting requests have blocks on their way."""
        return sum(load.is_under_way for load in self._by_request.values())

    @property
    def num_under_way(self) -> int:
        """Return how many blocks are being loaded, those included that nobody waits for any more."""
        return len(self._digests)

    def is_under_way(self, digest: bytes) -> bool:
        """Return whether a block with this content is being loaded, for whomever."""
        return digest in self._digests

    def is_loading(self, request: Request) -> bool:
        load = self._by_request.get(request)
        return load is not None and load.is_under_way

    def blocks_of(self, request: Request) -> list[int]:
        """Return the blocks that are held for a waiting request, to look at."""
        load = self._by_request.get(request)
        return [] if load is None else load.blocks

    def num_held(self, request: Request) -> int:
        return len(self.blocks_of(request))

    def num_loaded(self, request: Request, tier: Tier, num_blocks: int) -> int:
        """Return how many of the first `num_blocks` blocks have come from `tier` for a request."""
        load = self._by_request.get(request)
        return 0 if load is None else load.num_from(tier, num_blocks)

    def holders(self) -> list[Request]:
        """Return the waiting requests whose loads have ended and that hold blocks."""
        return [request for request, load in self._by_request.items() if load.blocks and not load.is_under_way]

    def start(self, request: Request, digests: list[bytes], blocks: list[int], sources: list[Source], patience: float) -> None:
        """Begin to load the last len(sources) of `blocks`. All of `blocks`, which the caller holds, belong to the load now.

        The caller has pinned the sources. The request waits for the disk for `patience` seconds.
        """
        load = self._by_request[request] = Load(request, digests, blocks, sources, self._clock(), patience)
        for at, source in enumerate(sources, load.num_found):
            self._digests.add(digests[at])
            if isinstance(source, Slot):
                self._move(load, at, source)
            else:
                load.queued.append(at)
        self.disk_link.begin(len(load.queued), load.since)
        if load.queued:
            self._queues.append(load)
            self.feed()

    def feed(self) -> None:
        """Begin reads of queued blocks, as far as the host has slots for them and the disk takes them."""
        while self._queues:
            load = self._queues[0]
            while load.queued:
                if not self._feed(load, load.queued[0]):
                    return
            self._queues.popleft()

    def read(self, host_slot: int, *, ok: bool) -> Request | None:
        """Note the end of a read into a slot of the host. Returns the request whose load has thereby ended, if it still waits."""
        slot = self._host.moving(host_slot)
        load, at = self._by_slot.pop(host_slot, (None, 0))
        if load is not None and ok:
            self._host.pin(slot)
        self._host.arrived(host_slot, ok=ok)
        if load is None:
            return None
        load.reading.remove(at)
        if ok:
            self._move(load, at, slot)
            return None
        self._digests.remove(load.digests[at])
        return self._cut(load, at)

    def arrived(self, block: int, *, ok: bool) -> Request | None:
        """Note the end of a move into `block`. Returns the request whose load has thereby ended, if it still waits."""
        load, at = self._by_block.pop(block)
        slot = load.moving.pop(at)
        self._digests.remove(load.digests[at])
        if not ok:
            self._host.drop(slot)
        self._host.unpin(slot)
        return self._end(load) if ok else self._cut(load, at)

    def overdue(self, *, is_on: bool) -> list[Request]:
        """Return the requests that should not wait for the disk any longer: it is off, or their patience is at an end."""
        waiting = [(request, load) for request, load in self._by_request.items() if load.queued or load.reading]
        now = self._clock() if waiting else 0.0
        return [request for request, load in waiting if not is_on or now - load.since > load.patience]

    def give_up(self, request: Request) -> Request | None:
        """Load no more blocks for a request than those that are being moved or have arrived.

        Returns the request if its load has thereby ended.
        """
        load = self._by_request[request]
        return self._cut(load, load.num_coming)

    def release(self, request: Request) -> None:
        """Give up what is held for a request. Blocks into which something is being moved stay held until it has arrived."""
        load = self._by_request.pop(request, None)
        if load is None:
            return
        load.owner = None
        if load.is_under_way:
            self._cut(load, load.num_coming)
        else:
            self._drop(load.blocks)

    def withdraw(self, family: bytes | None = None) -> None:
        """Give up all loads of a family, or all loads. The entries of their blocks have just been withdrawn."""
        for load in self._all():
            if family in (None, load.family):
                load.withdrawn = True
                if load.owner is not None and not load.is_under_way:
                    self.release(load.owner)

    def blocks(self) -> Iterator[int]:
        """Iterate over the blocks that are held for loads. A block that several loads hold comes several times."""
        for load in self._all():
            yield from load.blocks

    def check(self) -> None:
        """Raise InternalError if a block that is under way can be found, or if a finished load holds one that cannot."""
        under_way = 0
        for load in self._all():
            places = [*load.queued, *load.reading, *load.moving]
            under_way += len(places)
            if len(set(places)) != len(places) or any(load.digests[at] not in self._digests for at in places):
                raise InternalError(f"a block of {load.owner} is under way in two ways, or unknown")
            for at in places:
                if load.blocks[at] in self._index or self._pool.refs[load.blocks[at]] != 1:
                    raise InternalError(f"block {load.blocks[at]} is used before it is loaded")
            if load.queued and load not in self._queues:
                raise InternalError(f"blocks of {load.owner} wait to be read, and nobody reads them")
        if under_way != len(self._digests):
            raise InternalError("the digests of blocks that are loaded are not those of the blocks")
        for request, load in self._by_request.items():
            if load.owner is not request or (not load.is_under_way and any(block not in self._index for block in load.blocks)):
                raise InternalError(f"{request} holds blocks that were loaded and are not published")

    def _all(self) -> list[Load]:
        loads = [*self._by_request.values(), *(load for load, _ in self._by_block.values())]
        return list({id(load): load for load in loads}.values())

    def _move(self, load: Load, at: int, slot: Slot) -> None:
        """Move a block from a pinned slot of the host to the GPU."""
        load.moving[at] = slot
        self.host_link.begin(1, self._clock())
        self._by_block[load.blocks[at]] = load, at
        self._moves.move(self._host.place(slot), gpu(load.blocks[at]))

    def _feed(self, load: Load, at: int) -> bool:
        """Begin to read a queued block, or to move it if the host has it by now. Returns False if it must wait."""
        disk, record, digest = self._require_disk(), load.sources[at - load.num_found], load.digests[at]
        if isinstance(record, Slot):
            raise InternalError("a block that comes from the host is queued for the disk")
        if self._host.touch(digest, record.mask):
            slot = self._host.find(digest)
            if slot is None:  # it is on its way to the host
                return False
            load.queued.popleft()
            self.disk_link.cancel(1)
            disk.unpin(record)
            self._host.pin(slot)
            self._move(load, at, slot)
            return True
        slot = self._host.take(digest, load.family, record.mask) if disk.takes_reads else None
        if slot is None:
            return False
        disk.read(record, slot.number)
        load.queued.popleft()
        load.reading.add(at)
        self._by_slot[slot.number] = load, at
        return True

    def _cut(self, load: Load, num: int) -> Request | None:
        """Give up all blocks from number `num` on. Returns the owner if the load has thereby ended."""
        load.num_good = min(load.num_good, num)
        for at in [at for at in load.queued if at >= num]:
            load.queued.remove(at)
            self.disk_link.cancel(1)
            record = load.sources[at - load.num_found]
            if isinstance(record, DiskRecord):
                self._require_disk().unpin(record)
            self._digests.remove(load.digests[at])
        for number, (other, at) in list(self._by_slot.items()):
            if other is load and at >= num:
                del self._by_slot[number]
                load.reading.remove(at)
                self._digests.remove(load.digests[at])
        return self._end(load)

    def _end(self, load: Load) -> Request | None:
        """Publish what has arrived and give up the rest, if nothing is under way any more. Returns the owner if so."""
        if load.is_under_way:
            return None
        num_good = 0 if load.withdrawn else load.num_good
        for at in range(load.num_found, num_good):
            source = load.sources[at - load.num_found]
            self._index.put(load.digests[at], load.family, load.blocks[at], source.mask)
        for at in range(num_good - 1, load.num_found - 1, -1):  # the end of a prefix is evicted before its beginning
            self._host.touch(load.digests[at], load.sources[at - load.num_found].mask)
        if load.owner is None:
            self._drop(load.blocks)
            return None
        self._drop(load.blocks[num_good:])
        del load.blocks[num_good:], load.digests[num_good:]
        del load.sources[max(0, num_good - load.num_found) :]
        return load.owner

    def _drop(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self._pool.drop(block, keep=block in self._index)

    def _require_disk(self) -> DiskTier:
        if self._disk is None:
            raise InternalError("a block comes from a disk tier that does not exist")
        return self._disk
