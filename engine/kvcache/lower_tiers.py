"""LowerTiers: the tiers below the GPU together. It says what they have of a prefix, and what moves between them.

    GPU --demote--> host                   a published block is about to be overwritten
    GPU, host --saves--> disk              a block was used twice, or its request has finished
    disk --> host --loads--> GPU           a waiting request has the block in its prefix
    GPU --spill--> host                    the context of a running request is larger than the GPU's cache

`loads.py`, `saves.py` and `spill.py` carry one kind of move each. `manager.py` owns the GPU's blocks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

import msgspec

from engine.kvcache.chain import Chain, Entry
from engine.kvcache.disk.workers import Kind
from engine.kvcache.disk_tier import DiskTier
from engine.kvcache.gate import ComputeSeconds, Decision, LoadGate, unknown
from engine.kvcache.host_tier import HostTier, Slot
from engine.kvcache.kinds import HitRule
from engine.kvcache.load import Source
from engine.kvcache.loads import Loads
from engine.kvcache.moves import MoveList
from engine.kvcache.pool import BlockPool
from engine.kvcache.prefix import PrefixIndex
from engine.kvcache.saves import Saves
from engine.kvcache.spill import Spill
from engine.messages import TierStats
from engine.plan import Arrival, Tier, gpu
from engine.request import Request


class LowerTiers:
    """`host_slots` is the size of the host tier in blocks; 0: there are no lower tiers."""

    def __init__(
        self,
        pool: BlockPool,
        index: PrefixIndex,
        rule: HitRule,
        block_size: int,
        *,
        host_slots: int = 0,
        disk: DiskTier | None = None,
        compute: ComputeSeconds = unknown,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.moves = MoveList()
        self.host = HostTier(host_slots)
        self.disk = disk
        self.loads = Loads(pool, index, self.host, self.moves, disk, clock)
        self.spill = Spill(pool, self.host, self.moves, block_size)
        self.saves = None if disk is None else Saves(index, self.host, disk, self.moves)
        self.decisions: Counter[Decision] = Counter()
        self._gate = LoadGate(self.loads.host_link, self.loads.disk_link, block_size, compute)
        self._rule = rule
        self._clock = clock

    def __bool__(self) -> bool:
        """Return whether there is any tier below the GPU."""
        return self.host.num_slots > 0

    @property
    def has_work(self) -> bool:
        """Whether reads or writes of the disk are under way or are to begin, so that `tend` should be called soon.

        Calls that hang in a disk that is off are no work: they may never end.
        """
        return self.disk is not None and self.disk.is_on and (not self.disk.is_idle or bool(self.saves))

    @property
    def has_saves(self) -> bool:
        """Whether blocks are to be written to the disk, which is on."""
        return self.disk is not None and self.disk.is_on and bool(self.saves)

    def find(self, digest: bytes | None) -> Source | None:
        """Return where a block can be loaded from now."""
        if digest is None or self.loads.is_under_way(digest):
            return None
        if self.host.has(digest) or self.disk is None:
            return self.host.find(digest)
        return self.disk.find(digest)

    def sources(self, chain: Chain, limit: int, masks: list[int]) -> list[Source]:
        """Return where the blocks behind the chain's match can be loaded from, as far as they can be used.

        `limit` is the number of blocks that may be used, and `masks` are those of the matched ones, if the rule needs them.
        """
        found: list[Source] = []
        for index in range(len(chain.matched), limit):
            source = self.find(chain.digest(index))
            if source is None:
                break
            found.append(source)
        return self._usable(found, masks)

    def worth_loading(self, sources: list[Source], chain: Chain, num_tokens: int, masks: list[int]) -> list[Source]:
        """Return the first of `sources`, as far as loading them is faster than computing. See `sources`."""
        num = self._gate.num_worth(sources, len(chain.matched), num_tokens, self._clock())
        return sources if num == len(sources) else self._usable(sources[:num], masks)

    def start_load(self, request: Request, digests: list[bytes], blocks: list[int], sources: list[Source], *, most: int) -> None:
        """Begin to load the last len(sources) of `blocks`, of `most` that could be loaded. See Loads.start."""
        self.decisions[Decision.LOAD if len(sources) == most else Decision.PART] += 1
        patience = self._gate.patience(sources, len(blocks) - len(sources))
        self.loads.start(request, digests, blocks, sources, patience)

    def computes(self, chain: Chain) -> None:
        """Note that what follows the chain's match is computed, even if it could be loaded."""
        if self and self.find(chain.digest(len(chain.matched))) is not None:
            self.decisions[Decision.COMPUTE] += 1

    def pin(self, sources: list[Source]) -> None:
        """Keep the content of `sources`, which were just found, until it is loaded."""
        for source in sources:
            if isinstance(source, Slot):
                self.host.pin(source)
            elif self.disk is not None:
                self.disk.pin(source)

    def demote(self, block: int, entry: Entry, mask: int) -> None:
        """Move the content of a block that is about to be overwritten to the host, unless the host has it or has no slot."""
        if self.host.touch(entry.digest, mask):
            return
        slot = self.host.take(entry.digest, entry.family, mask)
        if slot is not None:
            self.moves.move(gpu(block), self.host.place(slot))

    def used(self, chain: Chain, num: int) -> None:
        """Note that the first `num` blocks of a prefix were used again, or belong to a request that has finished."""
        if self.saves is not None and num:
            self.saves.want(chain.digests[:num], chain.digests[0])

    def arrived(self, arrivals: Iterable[Arrival]) -> list[Request]:
        """Note the ends of moves. Returns the waiting requests whose loads have ended."""
        arrivals = list(arrivals)
        self.moves.count(arrivals)
        num_promoted = sum(dst.tier is Tier.GPU for dst, _ in arrivals)
        if num_promoted:
            self.loads.host_link.end(num_promoted, self._clock())
        ended = []
        for (tier, number), ok in arrivals:
            if tier is Tier.GPU:
                ended.append(self.loads.arrived(number, ok=ok))
                continue
            if self.spill.arrived(number, ok=ok):
                continue
            digest = self.host.moving(number).digest
            self.host.arrived(number, ok=ok)
            if self.saves is not None:
                self.saves.host_arrived(digest, ok=ok)
        self.loads.feed()
        return [request for request in ended if request is not None]

    def tend(self, seconds: float = 0.0) -> list[Request]:
        """Take over what the disk has done, and give it further work. Returns the waiting requests whose loads have ended.

        If nothing has ended on the disk, the call waits up to `seconds` for it.
        """
        if self.disk is None or self.saves is None:
            return []
        loaded, ends, now = [], self.disk.poll(seconds), self._clock()
        num_read = sum(end.kind is Kind.READ for end in ends)
        if num_read:
            self.loads.disk_link.end(num_read, now)
        for kind, number, ok in ends:
            if kind is Kind.READ:
                loaded.append(self.loads.read(number, ok=ok))
            else:
                self.saves.written(number, ok=ok)
        for request in self.loads.overdue(is_on=self.disk.is_on):
            self.decisions[Decision.GAVE_UP] += 1
            loaded.append(self.loads.give_up(request))
        self.loads.feed()
        self.saves.advance(now, has_news=bool(ends) or seconds > 0)
        return [request for request in loaded if request is not None]

    def _usable(self, sources: list[Source], masks: list[int]) -> list[Source]:
        if not sources or self._rule.is_plain:
            return sources
        usable = self._rule.longest([*masks, *(source.mask for source in sources)])
        return sources[: max(0, usable - len(masks))]

    def withdraw(self, family: bytes) -> None:
        """Forget all blocks of a family, because their content may be wrong."""
        self.host.withdraw(family)
        self.loads.withdraw(family)
        if self.disk is not None and self.saves is not None:
            self.saves.withdraw(family)
            self.disk.withdraw(family)

    def clear(self, tier: Tier) -> int:
        """Forget all blocks that a tier has. Returns how many there were. What is being read from the disk does not arrive."""
        if tier is Tier.HOST:
            return self.host.clear()
        if self.disk is None or self.saves is None:
            return 0
        self.saves.clear()
        return self.disk.clear()

    def stats(self, record_bytes: int, cached_tokens: dict[Tier, int]) -> dict[str, TierStats]:
        """Return the figures of each tier by its name. A block takes `record_bytes`, and `cached_tokens` are those of prompts."""
        moves, loads, found = self.moves, self.loads, {}
        if self:
            found["host"] = TierStats(
                blocks_used=len(self.host),
                blocks_limit=self.host.num_slots,
                cached_tokens=cached_tokens[Tier.HOST],
                num_demoted=moves.num_demoted,
                num_promoted=moves.num_promoted,
                num_failed=moves.num_failed,
                num_evicted=self.host.num_evicted,
                promoted_bytes=moves.num_promoted * record_bytes,
                demoted_bytes=moves.num_demoted * record_bytes,
                promote_seconds=loads.host_link.seconds_busy,
            )
        if self.disk is not None and self.saves is not None:
            found["disk"] = msgspec.structs.replace(
                self.disk.stats(),
                cached_tokens=cached_tokens[Tier.DISK],
                num_unsaved=self.saves.num_dropped,
                promote_seconds=loads.disk_link.seconds_busy,
            )
        return found

    def check(self) -> None:
        self.host.check()
        self.loads.check()
        self.spill.check()
        if self.disk is not None:
            self.disk.check()
