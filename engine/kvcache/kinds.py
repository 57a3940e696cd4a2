"""HitRule: how much of a prefix whose blocks are there can be used, if some blocks lack the records of some pools.

A block stands for `block_size` tokens of every pool. What the next token needs of the prefix depends on the kind of a pool:

    token    the records of all tokens              every block
    window   the records of the latest W tokens     the blocks that cover them
    state    one record, after the last token       the last block, if a slice ended at its end

A block therefore has a mask of the kinds whose records it holds: bit i stands for kind i, and ALL for every kind.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.plan import PoolKind

ALL = -1


class HitRule:
    """Applies to a cache whose pools are of `kinds`."""

    __slots__ = ("_spans", "_state", "_token", "inner", "is_plain")

    def __init__(self, kinds: tuple[PoolKind, ...], block_size: int) -> None:
        self._token = sum(1 << bit for bit, kind in enumerate(kinds) if kind.name == "token")
        self._state = sum(1 << bit for bit, kind in enumerate(kinds) if kind.name == "state")
        self._spans = [(1 << bit, -(-kind.window // block_size)) for bit, kind in enumerate(kinds) if kind.name == "window"]
        self.is_plain = not self._state and not self._spans
        self.inner = ALL & ~self._state  # mask of a full block at whose end no slice ended

    @property
    def has_state(self) -> bool:
        return self._state != 0

    def longest(self, masks: Iterable[int]) -> int:
        """Return the largest number of leading blocks that can be used, given the mask of each block of the prefix."""
        best, runs = 0, [0] * len(self._spans)
        for num, mask in enumerate(masks, 1):
            if mask & self._token != self._token:
                break
            complete = mask & self._state == self._state
            for i, (bit, span) in enumerate(self._spans):
                runs[i] = runs[i] + 1 if mask & bit else 0
                complete = complete and runs[i] >= min(num, span)
            if complete:
                best = num
        return best
