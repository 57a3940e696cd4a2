"""BlockPool: which KV blocks are held, how often, and in which order the free ones are given out.

    held   refs[b] > 0    in the block table of refs[b] requests
    free   refs[b] == 0   on the free list, least recently used first; what it holds stays readable until it is taken

Knows ids and counts only: what a block contains is `prefix.py`'s, whose block it is `manager.py`'s.
"""

from __future__ import annotations

from engine.errors import InternalError


class BlockPool:
    """All operations are O(1): the free list is a ring of two arrays, doubly linked through a sentinel at `num_blocks`."""

    __slots__ = ("_next", "_prev", "num_blocks", "num_free", "num_released", "refs")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self.num_released = 0  # times that a block lost its last holder, since the start
        self.refs = [0] * num_blocks
        self._next: list[int] = [*range(1, num_blocks + 1), 0]
        self._prev: list[int] = [num_blocks, *range(num_blocks)]

    def take(self) -> int:
        """Hold the least recently used free block; whatever it contained is lost. The caller made sure that there is one."""
        block = self._next[self.num_blocks]
        if block == self.num_blocks:
            raise InternalError("took a block from an empty pool")
        self._unlink(block)
        self.refs[block] = 1
        return block

    def hold(self, block: int) -> None:
        """One more holder of `block`, free or not; its content stays."""
        if self.refs[block] == 0:
            self._unlink(block)
        self.refs[block] += 1

    def drop(self, block: int, *, keep: bool) -> None:
        """One holder less. The last one frees it: to the far end of the list where its content is worth a `keep`."""
        refs = self.refs[block] - 1
        if refs < 0:
            raise InternalError(f"block {block} dropped more often than held")
        self.refs[block] = refs
        if refs == 0:
            self.num_released += 1
            self._link(block, before=self.num_blocks if keep else self._next[self.num_blocks])

    def check(self) -> None:
        """Every block is either held or on the free list once, and the list is whole in both directions."""
        seen = 0
        end = self.num_blocks
        block = self._next[end]
        while block != end:
            seen += 1
            if seen > self.num_blocks or self.refs[block] != 0 or self._prev[self._next[block]] != block:
                raise InternalError(f"free list broken at block {block}")
            block = self._next[block]
        if seen != self.num_free or seen != self.refs.count(0):
            raise InternalError(f"{seen} blocks listed free, {self.num_free} counted, {self.refs.count(0)} not held")

    def _link(self, block: int, *, before: int) -> None:
        after = self._prev[before]
        self._next[after] = self._prev[before] = block
        self._next[block] = before
        self._prev[block] = after
        self.num_free += 1

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before] = after
        self._prev[after] = before
        self.num_free -= 1
