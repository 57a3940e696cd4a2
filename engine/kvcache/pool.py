"""BlockPool: which KV blocks are held, by how many requests, and in which order free blocks are given out.

    held   refs[b] > 0    block b is in the block tables of refs[b] requests
    free   refs[b] == 0   block b is on the free list, least recently used first; its content stays until the block is taken

The pool knows ids and counts only. `prefix.py` knows what a block contains, `manager.py` which requests hold it.
"""

from __future__ import annotations

from engine.errors import InternalError


class BlockPool:
    """Counts the holders of each KV block, and keeps the free blocks in order of use. All operations are O(1).

    The free list is a doubly linked ring in two arrays, with a sentinel at index `num_blocks`.
    """

    __slots__ = ("_next", "_prev", "num_blocks", "num_free", "num_released", "refs")

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks
        self.num_released = 0  # times that a block lost its last holder, since the start
        self.refs = [0] * num_blocks
        self._next: list[int] = [*range(1, num_blocks + 1), 0]
        self._prev: list[int] = [num_blocks, *range(num_blocks)]

    def take(self) -> int:
        """Hold the least recently used free block and return its id. The caller may overwrite the block's content.

        Raises InternalError if no block is free.
        """
        block = self._next[self.num_blocks]
        if block == self.num_blocks:
            raise InternalError("took a block from an empty pool")
        self._unlink(block)
        self.refs[block] = 1
        return block

    def hold(self, block: int) -> None:
        """Add a holder to `block`, which may be free or held. The block keeps its content."""
        if self.refs[block] == 0:
            self._unlink(block)
        self.refs[block] += 1

    def drop(self, block: int, *, keep: bool) -> None:
        """Remove a holder from `block`. A block without holders becomes free.

        With `keep`, the block becomes the most recently used free one; otherwise it is the next to be taken.
        """
        refs = self.refs[block] - 1
        if refs < 0:
            raise InternalError(f"block {block} dropped more often than held")
        self.refs[block] = refs
        if refs == 0:
            self.num_released += 1
            self._link(block, before=self.num_blocks if keep else self._next[self.num_blocks])

    def check(self) -> None:
        """Raise InternalError unless each block is either held or on the free list once, and the list is linked both ways."""
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
