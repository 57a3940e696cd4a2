"""SimulatedBlocks: what each place of a KV cache holds, so that FakeRunner finds every step that would read anything else.

Each slot of a block remembers the prefix whose KV was written to it, in pools of all kinds (`PoolKind`). This finds wrong block
tables, missing copies, writes to shared blocks, wrong positions, and moves between tiers that are wrong or used before they have
arrived.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from engine.errors import InternalError
from engine.kvcache.host_memory import HostMemory
from engine.plan import PER_TOKEN, Arrival, BlockCopy, Place, PoolKind, StepPlan, Tier, gpu, host

MASK = (1 << 64) - 1
HASH_BYTES = 8

Record = list[int | None]
"""What one pool holds of a block: for each slot, or for the one state, a hash of the tokens up to and including its own. It is
None if it was never written, or is garbage. In host memory, a hash has 8 bytes and None is 0."""

Content = list[Record]
"""The records of a block, one for each kind of pool."""


class SliceOfRow(NamedTuple):
    """A slice, with the tokens and the block table of its row. The first blocks may lie in slots of the host."""

    tokens: Sequence[int]
    blocks: list[int]
    start: int
    end: int
    slots: list[int]

    def place(self, index: int) -> Place:
        """Return where a block of the row lies."""
        in_host = index < len(self.slots)
        return host(self.slots[index]) if in_host else gpu(self.blocks[index - len(self.slots)])


class _Move(NamedTuple):
    src: Place
    content: Content  # of the source when the move began


class SimulatedBlocks:
    """Holds the content of all GPU blocks, with a pool of each of `kinds`, and moves it to and from the slots of `host`."""

    def __init__(
        self, num_blocks: int, block_size: int, host: HostMemory | None = None, kinds: tuple[PoolKind, ...] = PER_TOKEN
    ) -> None:
        self._block_size = block_size
        self._kinds = kinds
        self._content = [self._garbage() for _ in range(num_blocks)]
        self._host = host
        self._record = struct.Struct(f"<{record_bytes(block_size, kinds) // HASH_BYTES}Q")
        self._moves: dict[Place, _Move] = {}  # destination -> move under way

    def run(self, plan: StepPlan, slices: Sequence[SliceOfRow]) -> None:
        """Run the copies and then all slices. What a slice reads must be what the tokens before it have written."""
        for copy in plan.copies:
            self._copy(copy)
        if len(set(plan.rows)) != len(plan.rows):
            raise InternalError("a row occurs twice in a step")
        prefixes = [_prefixes(one.tokens[: one.end]) for one in slices]
        for one, prefix in zip(slices, prefixes, strict=True):
            num_blocks = len(one.slots) + len(one.blocks)
            if len(prefix) != one.end or one.end > num_blocks * self._block_size:
                raise InternalError(f"positions {one.start} to {one.end} of {len(one.tokens)} tokens in {num_blocks} blocks")
            self._read_states(one, prefix)
        for one, prefix in zip(slices, prefixes, strict=True):
            self._write(one, prefix)
        for one, prefix in zip(slices, prefixes, strict=True):
            self._read_tokens(one, prefix)

    def _read_states(self, one: SliceOfRow, prefix: list[int]) -> None:
        for at, kind in enumerate(self._kinds):
            if kind.name == "state" and one.start:
                place = one.place((one.start - 1) // self._block_size)
                if self._usable(place)[at] != [prefix[one.start - 1]]:
                    raise InternalError(f"{place} does not hold the state before position {one.start} of the row that reads it")

    def _write(self, one: SliceOfRow, prefix: list[int]) -> None:
        for at, kind in enumerate(self._kinds):
            if kind.name == "state":
                self._written(one, one.end - 1)[at] = [prefix[one.end - 1]]
                continue
            for position in range(one.start, one.end):
                self._written(one, position)[at][position % self._block_size] = prefix[position]

    def _read_tokens(self, one: SliceOfRow, prefix: list[int]) -> None:
        """Read what each token of the slice attends to: all tokens before it, or those of its window, which includes itself."""
        for at, kind in enumerate(self._kinds):
            if kind.name == "state":
                continue
            first = max(0, one.start + 1 - kind.window) if kind.name == "window" else 0
            for begin in range(first - first % self._block_size, one.end, self._block_size):
                place = one.place(begin // self._block_size)
                record = self._usable(place)[at]
                for position in range(max(first, begin), min(one.end, begin + self._block_size)):
                    if record[position - begin] != prefix[position]:
                        raise InternalError(f"{place} does not hold position {position} of the row that reads it")

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
        content = [record.copy() for record in self._at(src)]
        if not copy.is_move:
            self._put(dst, content)
            return
        if any(None in record for kind, record in zip(self._kinds, content, strict=True) if kind.name == "token"):
            raise InternalError(f"{src} is moved, and holds no block")
        self._put(dst, self._garbage())
        self._moves[dst] = _Move(src, content)

    def _garbage(self) -> Content:
        return [[None] if kind.name == "state" else [None] * self._block_size for kind in self._kinds]

    def _written(self, one: SliceOfRow, position: int) -> Content:
        """Return the content of the GPU block in which a slice writes a position."""
        place = one.place(position // self._block_size)
        if place.tier is not Tier.GPU:
            raise InternalError(f"a step writes position {position} of a row to {place}")
        return self._usable(place)

    def _usable(self, place: Place) -> Content:
        """Return the content of a place that a step uses."""
        if place in self._moves:
            raise InternalError(f"{place} is used before its content has arrived")
        return self._at(place)

    def _at(self, place: Place) -> Content:
        if place.tier is Tier.GPU:
            return self._content[place.number]
        values = iter(self._record.unpack(self._slot(place)))
        return [[next(values) or None for _ in record] for record in self._garbage()]

    def _put(self, place: Place, content: Content) -> None:
        if place.tier is Tier.GPU:
            self._content[place.number] = content
        else:
            self._record.pack_into(self._slot(place), 0, *(value or 0 for record in content for value in record))

    def _slot(self, place: Place) -> memoryview:
        if self._host is None or not 0 <= place.number < self._host.num_slots:
            raise InternalError(f"{place} does not exist: the tier holds {self._host.num_slots if self._host else 0} blocks")
        return self._host.record(place.number)


def record_bytes(block_size: int, kinds: tuple[PoolKind, ...]) -> int:
    """Return how many bytes the simulated content of a block takes in host memory."""
    return HASH_BYTES * sum(1 if kind.name == "state" else block_size for kind in kinds)


def mix(state: int, value: int) -> int:
    state = (state ^ value) * 0xBF58476D1CE4E5B9 & MASK
    return state ^ state >> 29


def _prefixes(tokens: Sequence[int]) -> list[int]:
    """Return a hash of tokens[: i + 1] for each i. None is 0, which the hash of a first token could be if it began at 0."""
    state, out = MASK >> 1, []
    for token in tokens:
        state = mix(state + 1, token)
        out.append(state)
    return out
