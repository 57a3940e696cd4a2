"""SimulatedBlocks: what each place of a KV cache holds, so that FakeRunner finds every step that would read anything else.

Each slot of a block remembers the prefix whose KV was written to it. This finds wrong block tables, missing copies, writes to
shared blocks, wrong positions, and moves between tiers that are wrong or used before they have arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from engine.errors import InternalError
from engine.plan import Arrival, BlockCopy, Place, StepPlan, Tier

MASK = (1 << 64) - 1

Content = list[int | None]
"""A hash of the tokens up to and including each slot's own; None if the slot was never written, or holds garbage."""


class _Move(NamedTuple):
    src: Place
    content: Content  # of the source when the move began


class SimulatedBlocks:
    """Holds the content of all GPU blocks and host slots."""

    def __init__(self, num_blocks: int, block_size: int, host_slots: int = 0) -> None:
        self._block_size = block_size
        self._content: dict[Tier, list[Content]] = {
            tier: [[None] * block_size for _ in range(num)] for tier, num in ((Tier.GPU, num_blocks), (Tier.HOST, host_slots))
        }
        self._moves: dict[Place, _Move] = {}  # destination -> move under way

    def run(self, plan: StepPlan, rows: Sequence[tuple[Sequence[int], list[int]]]) -> None:
        """Run the copies, then the writes of all slices, then the reads: each slice attends to all positions before its end.

        `rows` has the tokens and the block table of each slice.
        """
        for copy in plan.copies:
            self._copy(copy)
        if len(set(plan.rows)) != len(plan.rows):
            raise InternalError("a row occurs twice in a step")
        slices = [(*row, start, start + num) for row, start, num in zip(rows, plan.starts, plan.nums, strict=True)]
        prefixes = [_prefixes(tokens[:end]) for tokens, _, _, end in slices]
        for (tokens, blocks, start, end), prefix in zip(slices, prefixes, strict=True):
            if len(prefix) != end or end > len(blocks) * self._block_size:
                raise InternalError(f"positions {start} to {end} of {len(tokens)} tokens in {len(blocks)} blocks")
            for position in range(start, end):
                self._slots(blocks[position // self._block_size])[position % self._block_size] = prefix[position]
        for (_, blocks, _, end), prefix in zip(slices, prefixes, strict=True):
            for position in range(end):
                block = blocks[position // self._block_size]
                if self._slots(block)[position % self._block_size] != prefix[position]:
                    raise InternalError(f"block {block} does not hold position {position} of the row that reads it")

    def arrive(self, arrival: Arrival) -> None:
        """End a move. If it failed, its destination holds garbage."""
        dst, ok = arrival
        move = self._moves.pop(dst)
        if move.src.tier is not Tier.GPU and self._at(move.src) != move.content:
            raise InternalError(f"{move.src} was overwritten while it was read")
        if ok:
            self._put(dst, move.content)

    def _copy(self, copy: BlockCopy) -> None:
        src, dst = copy
        if src in self._moves or dst in self._moves:
            raise InternalError(f"a copy from {src} to {dst}, of which one is about to be written by a move")
        content = self._at(src).copy()
        if not copy.is_move:
            self._put(dst, content)
            return
        if None in content:
            raise InternalError(f"{src} is moved, and holds no block")
        self._put(dst, [None] * self._block_size)
        self._moves[dst] = _Move(src, content)

    def _slots(self, block: int) -> Content:
        if Place(Tier.GPU, block) in self._moves:
            raise InternalError(f"block {block} is used before it is loaded")
        return self._content[Tier.GPU][block]

    def _at(self, place: Place) -> Content:
        return self._content[place.tier][place.number]

    def _put(self, place: Place, content: Content) -> None:
        if not 0 <= place.number < len(self._content[place.tier]):
            raise InternalError(f"{place} does not exist: the tier holds {len(self._content[place.tier])} blocks")
        self._content[place.tier][place.number] = content


def mix(state: int, value: int) -> int:
    state = (state ^ value) * 0xBF58476D1CE4E5B9 & MASK
    return state ^ state >> 29


def _prefixes(tokens: Sequence[int]) -> list[int]:
    """Return a hash of tokens[: i + 1] for each i."""
    state, out = 1, []
    for token in tokens:
        state = mix(state + 1, token)
        out.append(state)
    return out
