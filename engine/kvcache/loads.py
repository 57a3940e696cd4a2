"""Loads: the GPU blocks that are held for waiting requests while, and after, the rest of a prefix comes from a lower tier.

    blocks of a load   [ were on the GPU ... | come from a lower tier ... ]
                         published             published once all moves have arrived

The blocks are held, so nobody can take them before the request is admitted. If a move fails, its block and all behind it are
given up, and the request computes them. If the request ends meanwhile, the blocks stay held until their moves have arrived.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.errors import InternalError
from engine.kvcache.pool import BlockPool
from engine.kvcache.prefix import PrefixIndex
from engine.kvcache.tiers import LowerTier, Slot
from engine.request import Request


class Load:
    """Describes what is held for one waiting request."""

    __slots__ = ("blocks", "digests", "num_good", "owner", "slots", "under_way", "withdrawn")

    def __init__(self, owner: Request, digests: list[bytes], blocks: list[int], slots: list[Slot]) -> None:
        self.owner: Request | None = owner  # None: the request has ended, or has given its blocks back
        self.digests = digests  # of the blocks
        self.blocks = blocks
        self.slots = slots  # sources of the last len(slots) blocks
        self.under_way = {block: at for at, block in enumerate(blocks) if at >= len(blocks) - len(slots)}
        self.num_good = len(blocks)  # blocks before the first whose move failed
        self.withdrawn = False  # the content may be wrong

    @property
    def num_found(self) -> int:
        """How many blocks were on the GPU when the load began."""
        return len(self.blocks) - len(self.slots)


class Loads:
    """Keeps the loads of a pool. `start` takes over blocks that the caller holds, and slots that it has pinned."""

    def __init__(self, pool: BlockPool, index: PrefixIndex, tier: LowerTier) -> None:
        self._pool = pool
        self._index = index
        self._tier = tier
        self._by_request: dict[Request, Load] = {}
        self._by_block: dict[int, Load] = {}  # blocks whose moves are under way
        self._digests: dict[bytes, Load] = {}  # contents under way

    def __len__(self) -> int:
        """Return how many waiting requests have a load."""
        return len(self._by_request)

    def __contains__(self, request: Request) -> bool:
        return request in self._by_request

    @property
    def num_under_way(self) -> int:
        """Return how many blocks are being loaded, those included that nobody waits for any more."""
        return len(self._by_block)

    def is_under_way(self, digest: bytes) -> bool:
        """Return whether a block with this content is being loaded, for whomever."""
        return digest in self._digests

    def is_loading(self, request: Request) -> bool:
        load = self._by_request.get(request)
        return load is not None and bool(load.under_way)

    def num_held(self, request: Request) -> int:
        load = self._by_request.get(request)
        return 0 if load is None else len(load.blocks)

    def num_loaded(self, request: Request) -> int:
        """Return how many blocks have come from the lower tier for a request."""
        load = self._by_request.get(request)
        return 0 if load is None else len(load.slots)

    def holders(self) -> list[Request]:
        """Return the waiting requests whose loads have ended and that hold blocks."""
        return [request for request, load in self._by_request.items() if not load.under_way]

    def start(self, request: Request, digests: list[bytes], blocks: list[int], slots: list[Slot]) -> None:
        """Note that the last len(slots) of `blocks` come from `slots`. All of `blocks` belong to the load from now on."""
        load = self._by_request[request] = Load(request, digests, blocks, slots)
        for block, digest in zip(blocks[load.num_found :], digests[load.num_found :], strict=True):
            self._by_block[block] = self._digests[digest] = load

    def arrived(self, block: int, *, ok: bool) -> Request | None:
        """Note the end of a move into `block`. Returns the request whose load has thereby ended, if it still waits."""
        load = self._by_block.pop(block)
        at = load.under_way.pop(block)
        del self._digests[load.digests[at]]
        if not ok:
            load.num_good = min(load.num_good, at)
            self._tier.drop(load.slots[at - load.num_found])
        if load.under_way:
            return None
        self._finish(load)
        return load.owner

    def release(self, request: Request) -> None:
        """Give up what is held for a request. Blocks whose moves are under way stay held until these arrive."""
        load = self._by_request.pop(request, None)
        if load is not None:
            load.owner = None
            if not load.under_way:
                self._drop(load.blocks)

    def withdraw(self, family: bytes) -> None:
        """Give up all loads of a family, whose entries have just been withdrawn."""
        for load in {id(load): load for load in [*self._by_request.values(), *self._by_block.values()]}.values():
            if load.digests[0] == family:
                load.withdrawn = True
                if load.owner is not None and not load.under_way:
                    self.release(load.owner)

    def blocks(self) -> Iterator[int]:
        """Iterate over the blocks that are held for loads. A block that several loads hold comes several times."""
        loads = {id(load): load for load in [*self._by_request.values(), *self._by_block.values()]}
        for load in loads.values():
            yield from load.blocks

    def check(self) -> None:
        """Raise InternalError if a block that is under way can be found, or if a finished load holds one that cannot."""
        for block, load in self._by_block.items():
            if block not in load.under_way or block in self._index or self._pool.refs[block] != 1:
                raise InternalError(f"block {block} is used before it is loaded")
        if len(self._digests) != len(self._by_block):
            raise InternalError("the digests of blocks that are loaded are not those of the blocks")
        for request, load in self._by_request.items():
            if load.owner is not request or (not load.under_way and any(block not in self._index for block in load.blocks)):
                raise InternalError(f"{request} holds blocks that were loaded and are not published")

    def _finish(self, load: Load) -> None:
        """Publish what has arrived, and give up the rest."""
        num_good = 0 if load.withdrawn else load.num_good
        for at in range(load.num_found, num_good):
            self._index.put(load.digests[at], load.digests[0], load.blocks[at], load.slots[at - load.num_found].mask)
        for slot in reversed(load.slots):  # the end of a prefix is evicted before its beginning
            self._tier.unpin(slot)
        if load.owner is None:
            self._drop(load.blocks)
            return
        self._drop(load.blocks[num_good:])
        del load.blocks[num_good:], load.digests[num_good:]
        del load.slots[max(0, num_good - load.num_found) :]
        if not load.blocks:
            del self._by_request[load.owner]

    def _drop(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self._pool.drop(block, keep=block in self._index)
