"""KVCacheManager: gives requests their blocks and takes them back. It decides; the runner moves.

    request.blocks   [ shared, full ... | own, full ... | own, being filled | own, empty ... ]
                       matched or forked                  ^ num_computed // block_size

Only full blocks are ever shared, and a request always computes at least its last token, so what it writes lies behind
every shared block. A block counts as readable once the step that writes it is submitted: steps run in order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from engine.errors import InternalError
from engine.kvcache.pool import BlockPool
from engine.kvcache.prefix import Chain, PrefixIndex
from engine.plan import BlockCopy
from engine.request import Request


class KVCacheManager:
    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._pool = BlockPool(num_blocks)
        self._index = PrefixIndex()
        self._prefix_caching = prefix_caching
        self._chains: dict[Request, Chain] = {}

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def num_used(self) -> int:
        return self.num_blocks - self._pool.num_free

    @property
    def num_cached(self) -> int:
        """Blocks that a prompt can be matched with, held or free."""
        return len(self._index)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def admit(self, request: Request, *, spare: int = 0, match: bool = True) -> bool:
        """Give `request` blocks for all its tokens, the cached ones first, and set `num_computed` to what those hold.

        False, and nothing changed, where that would leave fewer than `spare` blocks free.
        """
        shared: list[int] = []
        chain: Chain | None = None
        if match and self._prefix_caching:
            limit = (len(request.tokens) - 1) // self.block_size
            chain = self._chain(request, limit)
            shared, parent = self._index.match(chain, limit)
        if not self._hold(request, shared, spare):
            return False
        if chain is not None:
            chain.num_published, chain.parent = len(shared), parent
        request.num_computed = len(shared) * self.block_size
        return True

    def fork(self, request: Request, leader: Request, *, spare: int = 0) -> list[BlockCopy] | None:
        """Give `request` the prompt of `leader`, which is computed, all but its last token; None where blocks are short.

        Full blocks are shared. The one that both would write to is copied, as far as it is filled.
        """
        computed = request.num_prompt - 1
        full, part = divmod(computed, self.block_size)
        if not self._hold(request, leader.blocks[:full], spare):
            return None
        if self._prefix_caching and leader in self._chains:
            chain = self._chains[request] = Chain(request.salt)
            chain.links = self._chains[leader].links[:full]
        request.num_computed = computed
        return [BlockCopy(leader.blocks[full], request.blocks[full])] if part else []

    def extend(self, request: Request) -> int | None:
        """Append one block to a request whose blocks are all full; None when there is none."""
        if self._pool.num_free == 0:
            return None
        self.publish(request)
        block = self._take()
        request.blocks.append(block)
        return block

    def publish(self, request: Request) -> None:
        """Make the request's full blocks findable. From here on only later steps may share them."""
        if not self._prefix_caching:
            return
        full = min(request.num_computed, len(request.tokens)) // self.block_size
        chain = self._chain(request, full)
        if chain.num_published < full:
            self._index.publish(chain, request.blocks[:full])

    def release(self, request: Request) -> None:
        """Take all blocks back. They stay findable, and the ends of a chain are reused before its beginning."""
        if request.blocks:
            self.publish(request)
        for block in reversed(request.blocks):
            self._pool.drop(block, keep=block in self._index)
        request.blocks = []
        request.num_computed = 0
        self._chains.pop(request, None)

    def check(self, holders: Iterable[Request]) -> None:
        """Holds are counted right, and no request can write to a block that another one can read."""
        self._pool.check()
        self._index.check()
        held: Counter[int] = Counter()
        for request in holders:
            held.update(request.blocks)
            if request.num_computed > len(request.blocks) * self.block_size:
                raise InternalError(f"{request} has only {len(request.blocks)} blocks")
            for block in request.blocks[request.num_computed // self.block_size :]:
                if self._pool.refs[block] != 1 or block in self._index:
                    raise InternalError(f"{request} would write to block {block}, which others can read")
        if held != Counter({block: refs for block, refs in enumerate(self._pool.refs) if refs}):
            raise InternalError("block counts differ from what the requests hold")

    def _chain(self, request: Request, num_blocks: int) -> Chain:
        chain = self._chains.get(request)
        if chain is None:
            chain = self._chains[request] = Chain(request.salt)
        chain.lengthen(request.tokens, self.block_size, num_blocks)
        return chain

    def _hold(self, request: Request, shared: list[int], spare: int) -> bool:
        pool = self._pool
        num_new = self.blocks_for(len(request.tokens)) - len(shared)
        revived = sum(1 for block in shared if pool.refs[block] == 0)
        if num_new + revived + spare > pool.num_free:
            return False
        for block in shared:
            pool.hold(block)
        request.blocks = shared + [self._take() for _ in range(num_new)]
        return True

    def _take(self) -> int:
        block = self._pool.take()
        self._index.forget(block)
        return block
