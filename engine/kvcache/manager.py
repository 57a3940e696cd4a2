"""KVCacheManager: gives requests their blocks and takes them back. It decides which blocks; the runner moves their content.

    request.blocks   [ shared, full ... | own, full ... | own, being filled | own, empty ... ]
                       matched or forked                  ^ num_computed // block_size

Only full blocks are ever shared, and a request always computes at least its last token. A request therefore never writes
to a shared block. A block counts as readable once the step that writes it is submitted, because steps run in order.

A request that spills has no `blocks`: `spill.py` knows where its KV lies.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable

from engine.errors import InternalError
from engine.kvcache.chain import Chain
from engine.kvcache.disk_tier import DiskTier
from engine.kvcache.gate import ComputeSeconds, unknown
from engine.kvcache.identity import BlockIdentity
from engine.kvcache.kinds import ALL, HitRule
from engine.kvcache.lower_tiers import LowerTiers
from engine.kvcache.pool import BlockPool
from engine.kvcache.prefix import PrefixIndex
from engine.plan import PER_TOKEN, Arrival, BlockCopy, PoolKind, SpilledContext, Tier, gpu
from engine.request import Request


class KVCacheManager:
    """`identity` computes the digests of blocks; by default its key is random, and it knows of one model only.

    If `host_slots` is not 0, the content of a published block is moved to a slot in host memory before the block is overwritten,
    and comes back when a request has the same prefix. So does the content of blocks that `disk` has. `compute` predicts how long
    it takes to compute a part of a prompt instead. A request whose tokens do not fit into the GPU spills into these slots, and
    keeps its latest `resident_tokens` at least in the GPU.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool = True,
        identity: BlockIdentity | None = None,
        host_slots: int = 0,
        disk: DiskTier | None = None,
        kinds: tuple[PoolKind, ...] = PER_TOKEN,
        compute: ComputeSeconds = unknown,
        clock: Callable[[], float] = time.monotonic,
        resident_tokens: int = 1,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.prefix_caching = prefix_caching
        self._identity = identity or BlockIdentity(block_size)
        self._rule = HitRule(kinds, block_size)
        # Whether a sibling can take over a prompt but its last token. A state is only kept at the end of what was computed.
        self.can_fork = not self._rule.has_state
        # Slices of prompts should end at multiples of so many tokens, so that states are kept there. 1: it does not matter.
        self.align = block_size if self._rule.has_state and prefix_caching else 1
        self.has_tiers = host_slots > 0
        self._pool = BlockPool(num_blocks)
        self._index = PrefixIndex()
        self._chains: dict[Request, Chain] = {}
        self._tiers = LowerTiers(
            self._pool, self._index, self._rule, block_size, host_slots=host_slots, disk=disk, compute=compute, clock=clock
        )
        self._loads = self._tiers.loads
        self._fewest_resident = min(num_blocks, self.blocks_for(resident_tokens) + 1)  # the newest one may hold one token

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

    @property
    def tiers(self) -> LowerTiers:
        """The tiers below the GPU, to look at."""
        return self._tiers

    @property
    def num_moving(self) -> int:
        """Return how many moves between the GPU and the host a plan carries or will carry that have not arrived."""
        return self._tiers.moves.num_under_way

    @property
    def num_waiting_loads(self) -> int:
        """Return how many waiting requests have blocks on their way from a lower tier."""
        return self._loads.num_waiting

    @property
    def num_loading(self) -> int:
        """Return how many GPU blocks are being loaded from a lower tier. They cannot be given back before they have arrived."""
        return self._loads.num_under_way

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    @property
    def max_blocks(self) -> int:
        """Return how many blocks a request can have: those of the GPU, and behind them those of the host, if it can spill.

        Only records of tokens are attended to in the host.
        """
        return self.num_blocks + (self._tiers.host.num_slots if self._rule.is_plain else 0)

    def outgrows(self, request: Request) -> bool:
        """Return whether the tokens of a request are more than the GPU's cache holds, so that it spills."""
        return self.blocks_for(request.num_tokens) > self.num_blocks

    def match(self, request: Request) -> int:
        """Return how many blocks of a waiting request's tokens are in the cache and can be used. The last token is never matched.

        The result is remembered, so that the next call does only the work for what changed in between.
        """
        chain = self._chain(request)
        added = self._index.match(chain, self._most_matched(request))
        if self._rule.is_plain:
            chain.retry_at -= added
            return len(chain.matched)
        before, chain.num_usable = chain.num_usable, self._rule.longest(self._masks(chain))
        chain.retry_at -= max(0, chain.num_usable - before)
        return chain.num_usable

    def reach(self, request: Request) -> int:
        """Return how many blocks of a waiting request's tokens can be used once those in lower tiers are loaded."""
        num, chain = self.match(request), self._chains[request]
        sources = self._tiers.sources(chain, self._most_matched(request), self._masks(chain)) if self.has_tiers else []
        return len(chain.matched) + len(sources) if sources else num

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

        The leading blocks come from the cache, unless `match` is off. What was held for the request while it waited is given up.
        """
        chain: Chain | None = None
        shared: list[int] = []
        if match and self.prefix_caching:
            self.match(request)
            chain = self._chains[request]
            if self._pool.num_released < chain.retry_at:
                return False
            shared = self._shared(chain)
        missing = self._missing(request, shared)
        if missing + spare > 0:
            if chain is not None and missing > 0:
                # A released block, or a further matched block, reduces the number of missing blocks by at most one.
                chain.retry_at = self._pool.num_released + missing
            return False
        self._hold(request, shared)
        request.num_loaded = self._loads.num_loaded(request, Tier.HOST, len(shared)) * self.block_size
        request.num_from_disk = self._loads.num_loaded(request, Tier.DISK, len(shared)) * self.block_size
        self._loads.release(request)
        if chain is not None:
            self._tiers.computes(chain)
            self._tiers.used(chain, len(shared))
            chain.num_published = len(shared)
            chain.matched = []
        request.num_computed = len(shared) * self.block_size
        return True

    def admit_spilling(self, request: Request, *, spare: int = 0) -> bool:
        """Give `request` a window of GPU blocks: half of the free ones, or as many as it needs if those are more.

        Returns False if another request spills, or if fewer than `spare` blocks would stay free.
        """
        num_free, fewest = self._pool.num_free - spare, self.num_needed(request)
        if self._tiers.spill.owner is not None or num_free < fewest:
            return False
        self._tiers.spill.start(request, [self._take() for _ in range(max(fewest, num_free // 2))])
        return True

    def spill_reach(self, most: int) -> int:
        """Return up to which position the next step of the request that spills may run. See Spill."""
        return self._tiers.spill.reach(most)

    def spilled(self) -> SpilledContext:
        """Return where the KV of the request that spills lies."""
        return self._tiers.spill.context()

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
        self._loads.release(request)
        if self.prefix_caching and leader in self._chains:
            chain, leading = self._chain(request), self._chains[leader]
            chain.digests = leading.digests[:full]
            chain.num_published = min(full, leading.num_published)
            chain.closed = leading.closed
        request.num_computed = computed
        if part:
            self._tiers.moves.copy(gpu(leader.blocks[full]), gpu(request.blocks[full]))
        return True

    def load(self, request: Request, *, spare: int = 0) -> bool:
        """Begin to load the blocks of a waiting request that lower tiers have and the GPU lacks. Returns False if there is none.

        It begins once, and only if the request could be admitted now with all its blocks. The request then holds what the GPU
        has of its prefix and what is loaded, and must not be admitted before `arrived` or `tend` returns it.
        """
        if request in self._loads:
            return False
        self.match(request)
        chain = self._chains[request]
        if self._pool.num_released < chain.retry_at or self._tiers.find(chain.digest(len(chain.matched))) is None:
            return False
        self._index.verify(chain)
        masks = self._masks(chain)
        all_sources = self._tiers.sources(chain, self._most_matched(request), masks)
        sources = self._tiers.worth_loading(all_sources, chain, len(request.tokens), masks)
        shared = [entry.block for entry in chain.matched]
        if not sources or self._missing(request, shared) + spare > 0:
            return False
        for block in shared:
            self._pool.hold(block)
        self._tiers.pin(sources)  # before other blocks are demoted
        blocks = shared + [self._take() for _ in sources]
        self._tiers.start_load(request, chain.digests[: len(blocks)], blocks, sources, most=len(all_sources))
        return True

    def awaits_load(self, request: Request) -> bool:
        """Return whether the first block that the GPU lacks of a waiting request is being loaded for another one."""
        digest = self.next_digest(request)
        return digest is not None and self._loads.is_under_way(digest)

    def arrived(self, arrivals: Iterable[Arrival]) -> list[Request]:
        """Note the ends of moves. Returns the waiting requests whose loads have ended."""
        return self._tiers.arrived(arrivals)

    def tend(self, seconds: float = 0.0) -> list[Request]:
        """Take over what the disk tier has done. See LowerTiers."""
        return self._tiers.tend(seconds)

    def is_loading(self, request: Request) -> bool:
        """Return whether blocks of a waiting request are on their way from a lower tier."""
        return self._loads.is_loading(request)

    def holders(self) -> list[Request]:
        """Return the waiting requests that hold blocks, none of which is still being loaded."""
        return self._loads.holders()

    def num_held(self, request: Request) -> int:
        """Return how many blocks a waiting request holds."""
        return self._loads.num_held(request)

    def num_needed(self, request: Request) -> int:
        """Return how many blocks a waiting request still needs at most, beside those that it holds."""
        if request.spills:
            return max(self._fewest_resident, self.blocks_for(request.end_len - 1) - self._tiers.host.num_slots)
        return self.blocks_for(len(request.tokens)) - self._loads.num_held(request)

    def shortage(self, request: Request) -> int:
        """Return how many blocks at least must become free before a request that was refused blocks can be admitted."""
        chain = self._chains.get(request)
        return 0 if chain is None else max(0, chain.retry_at - self._pool.num_released)

    def give_back(self, request: Request) -> None:
        """Free what a waiting request holds. It is still found in the cache until it is overwritten."""
        self._loads.release(request)

    @property
    def has_copies(self) -> bool:
        return len(self._tiers.moves) > 0

    def take_copies(self) -> list[BlockCopy]:
        """Return the copies that the next plan must carry, in order, and forget them."""
        return self._tiers.moves.take()

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
            inner = self._rule.inner
            last = ALL if inner == ALL or request.num_computed == full * self.block_size else inner
            self._index.publish(chain, request.blocks, full, inner, last)

    def withdraw(self, request: Request) -> None:
        """Remove the request's blocks from the prefix cache, and all others that begin with its first block.

        The content of the request's blocks may be wrong, and with it what others computed from it.
        """
        chain = self._chain(request)
        chain.closed = True
        family = chain.digest(0)
        if family is not None:
            self._index.withdraw(family)
            self._tiers.withdraw(family)

    def reset(self, tiers: Collection[Tier]) -> dict[Tier, int]:
        """Forget all blocks that `tiers` have of prefixes. Returns how many each of them had.

        Running requests go on. If the GPU is among `tiers`, no later request shares what they have computed or will compute, and
        what is being loaded for waiting requests is dropped once it has arrived.
        """
        return {tier: self._forget_gpu() if tier is Tier.GPU else self._tiers.clear(tier) for tier in tiers}

    def release(self, request: Request, *, finished: bool = False) -> None:
        """Release all blocks of a request, and what is held for it while it waits.

        Published blocks stay in the prefix cache. The last block of a prefix is evicted first. With `finished`, the request is a
        turn that a later request may continue, and its blocks are worth keeping on disk.
        """
        self._loads.release(request)
        self._tiers.spill.release(request)
        if request.blocks:
            self.publish(request)
            if finished and self.prefix_caching and not (chain := self._chain(request)).closed:
                self._tiers.used(chain, chain.num_published)
        for block in reversed(request.blocks):
            self._pool.drop(block, keep=block in self._index)
        request.blocks = []
        request.num_computed = 0
        self._chains.pop(request, None)

    def num_freed_by(self, requests: Iterable[Request]) -> int:
        """Return how many blocks would become free if all of `requests`, running or waiting, released theirs. Others may share
        some of them."""
        held = Counter(block for request in requests for block in request.blocks or self._loads.blocks_of(request))
        return sum(1 for block, num in held.items() if self._pool.refs[block] == num)

    def check(self, holders: Iterable[Request]) -> None:
        """Raise InternalError if block counts are wrong, or if a request could write to a block that another can read."""
        self._pool.check()
        self._index.check()
        self._tiers.check()
        held = Counter([*self._loads.blocks(), *self._tiers.spill.blocks()])
        for request in holders:
            held.update(request.blocks)
            if request.num_computed > len(request.blocks) * self.block_size:
                raise InternalError(f"{request} has only {len(request.blocks)} blocks")
            for block in request.blocks[request.num_computed // self.block_size :]:
                if self._pool.refs[block] != 1 or block in self._index:
                    raise InternalError(f"{request} would write to block {block}, which others can read")
        if held != Counter({block: refs for block, refs in enumerate(self._pool.refs) if refs}):
            raise InternalError("block counts differ from what the requests hold")

    def _forget_gpu(self) -> int:
        num = self._index.clear()
        for request, chain in self._chains.items():
            if request.blocks:
                chain.closed = True
            chain.matched, chain.num_usable = [], 0
        self._loads.withdraw()
        return num

    def _chain(self, request: Request) -> Chain:
        chain = self._chains.get(request)
        if chain is None:
            chain = self._chains[request] = Chain(self._identity, request.salt, request.tokens)
        return chain

    def _most_matched(self, request: Request) -> int:
        """Return how many blocks of a request's tokens may come from the cache: the last token is always computed."""
        return (len(request.tokens) - 1) // self.block_size

    def _masks(self, chain: Chain) -> list[int]:
        """Return the masks of the matched blocks, which the rule for hits needs. Empty if it needs none."""
        return [] if self._rule.is_plain else [self._index.mask(entry.block) for entry in chain.matched]

    def _shared(self, chain: Chain) -> list[int]:
        """Return the blocks of the chain's match that can be used."""
        self._index.verify(chain)
        blocks = [entry.block for entry in chain.matched]
        return blocks if self._rule.is_plain else blocks[: self._rule.longest(self._masks(chain))]

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
        if self.prefix_caching:
            self._chain(request)  # which `reset` closes

    def _take(self) -> int:
        """Return a block to be overwritten. If its content would be lost, it is moved to the host tier."""
        block = self._pool.take()
        if block in self._index:
            mask = self._index.mask(block)
            entry = self._index.forget(block)
            if entry is not None and self.has_tiers:
                self._tiers.demote(block, entry, mask)
        return block
