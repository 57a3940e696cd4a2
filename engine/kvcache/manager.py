"""KVCacheManager: gives requests their blocks and takes them back. It decides which blocks; the runner moves their content.

    request.blocks   [ shared, full ... | own, full ... | own, being filled | own, empty ... ]
                       matched or forked                  ^ num_computed // block_size

Only full blocks are ever shared, and a request always computes at least its last token. A request therefore never writes
to a shared block. A block counts as readable once the step that writes it is submitted, because steps run in order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from engine.errors import InternalError
from engine.kvcache.chain import Chain
from engine.kvcache.identity import BlockIdentity
from engine.kvcache.pool import BlockPool
from engine.kvcache.prefix import PrefixIndex
from engine.plan import BlockCopy, gpu
from engine.request import Request


class KVCacheManager:
    """`identity` computes the digests of blocks; by default its key is random, and it knows of one model only."""

    def __init__(
        self, num_blocks: int, block_size: int, *, prefix_caching: bool = True, identity: BlockIdentity | None = None
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.prefix_caching = prefix_caching
        self._identity = identity or BlockIdentity(block_size)
        self._pool = BlockPool(num_blocks)
        self._index = PrefixIndex()
        self._chains: dict[Request, Chain] = {}
        self._copies: list[BlockCopy] = []

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def num_used(self) -> int:
        return self.num_blocks - self._pool.num_free

    @property
    def num_cached(self) -> int:
        """Return how many published blocks a prompt can be matched with. Blocks with the same content count once."""
        return len(self._index)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, request: Request) -> int:
        """Return how many blocks of a waiting request's tokens are in the cache. The last token is never matched.

        The result is remembered, so that the next call does only the work for what changed in between.
        """
        chain = self._chain(request)
        chain.retry_at -= self._index.match(chain, (len(request.tokens) - 1) // self.block_size)
        return len(chain.matched)

    def next_digest(self, request: Request) -> bytes | None:
        """Return the digest of the first full block that is not cached (waiting request) or not published (running request).

        Returns None if there is no such block, or if the block will not be published.
        """
        if not self.prefix_caching:
            return None
        chain = self._chain(request)
        if chain.closed:
            return None
        return chain.digest(chain.num_published if request.blocks else len(chain.matched))

    def admit(self, request: Request, *, spare: int = 0, match: bool = True) -> bool:
        """Give `request` blocks for all its tokens. Returns False if fewer than `spare` blocks would stay free.

        The leading blocks come from the cache, unless `match` is off.
        """
        chain: Chain | None = None
        shared: list[int] = []
        if match and self.prefix_caching:
            self.match(request)
            chain = self._chains[request]
            if self._pool.num_released < chain.retry_at:
                return False
            self._index.verify(chain)
            shared = [entry.block for entry in chain.matched]
        missing = self._missing(request, shared)
        if missing + spare > 0:
            if chain is not None and missing > 0:
                # A released block, or a further matched block, reduces the number of missing blocks by at most one.
                chain.retry_at = self._pool.num_released + missing
            return False
        self._hold(request, shared)
        if chain is not None:
            chain.num_published = len(shared)
            chain.matched = []
        request.num_computed = len(shared) * self.block_size
        return True

    def fork(self, request: Request, leader: Request, *, spare: int = 0) -> bool:
        """Give `request` the computed prompt of `leader`, all but its last token. Returns False if blocks are short.

        Full blocks are shared. The block that both requests would write to is copied.
        """
        computed = request.num_prompt - 1
        full, part = divmod(computed, self.block_size)
        num_new = self.blocks_for(len(request.tokens)) - full
        if num_new + spare > self._pool.num_free:
            return False
        self._hold(request, leader.blocks[:full])
        if self.prefix_caching and leader in self._chains:
            chain, leading = self._chain(request), self._chains[leader]
            chain.digests = leading.digests[:full]
            chain.num_published = min(full, leading.num_published)
            chain.closed = leading.closed
        request.num_computed = computed
        if part:
            self._copies.append(BlockCopy(gpu(leader.blocks[full]), gpu(request.blocks[full])))
        return True

    def take_copies(self) -> list[BlockCopy]:
        """Return the copies that the next plan must carry, in order, and forget them."""
        copies, self._copies = self._copies, []
        return copies

    def extend(self, request: Request) -> int | None:
        """Append one block to a request whose blocks are all full. Returns the block, or None if no block is free."""
        if self._pool.num_free == 0:
            return None
        self.publish(request)
        block = self._take()
        request.blocks.append(block)
        return block

    def publish(self, request: Request) -> None:
        """Publish the request's full blocks in the prefix cache. Only requests of later steps may share these blocks."""
        if not self.prefix_caching:
            return
        full = min(request.num_computed, len(request.tokens)) // self.block_size
        chain = self._chain(request)
        if chain.num_published < full:
            self._index.publish(chain, request.blocks, full)

    def withdraw(self, request: Request) -> None:
        """Remove the request's blocks from the prefix cache, and all others that begin with its first block.

        The content of the request's blocks may be wrong, and with it what others computed from it.
        """
        chain = self._chain(request)
        chain.closed = True
        family = chain.digest(0)
        if family is not None:
            self._index.withdraw(family)

    def release(self, request: Request) -> None:
        """Release all blocks of a request. Published blocks stay in the prefix cache; a prefix's last block is evicted first."""
        if request.blocks:
            self.publish(request)
        for block in reversed(request.blocks):
            self._pool.drop(block, keep=block in self._index)
        request.blocks = []
        request.num_computed = 0
        self._chains.pop(request, None)

    def num_freed_by(self, requests: Iterable[Request]) -> int:
        """Return how many blocks would become free if all of `requests` released theirs. Others may share some of them."""
        held = Counter(block for request in requests for block in request.blocks)
        return sum(1 for block, num in held.items() if self._pool.refs[block] == num)

    def check(self, holders: Iterable[Request]) -> None:
        """Raise InternalError if block counts are wrong, or if a request could write to a block that another can read."""
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

    def _chain(self, request: Request) -> Chain:
        chain = self._chains.get(request)
        if chain is None:
            chain = self._chains[request] = Chain(self._identity, request.salt, request.tokens)
        return chain

    def _missing(self, request: Request, shared: list[int]) -> int:
        """Return how many blocks the request lacks: needed minus free blocks. A negative result is the number that stay free."""
        refs = self._pool.refs
        num_new = self.blocks_for(len(request.tokens)) - len(shared)
        return num_new + sum(1 for block in shared if not refs[block]) - self._pool.num_free

    def _hold(self, request: Request, shared: list[int]) -> None:
        """Give `request` the blocks `shared`, and new ones for the rest of its tokens."""
        for block in shared:
            self._pool.hold(block)
        num_new = self.blocks_for(len(request.tokens)) - len(shared)
        request.blocks = shared + [self._take() for _ in range(num_new)]

    def _take(self) -> int:
        block = self._pool.take()
        self._index.forget(block)
        return block
