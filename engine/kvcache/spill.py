"""Spill: where the KV of the one running request lies whose context is larger than the GPU's cache.

    position      0 ........................ | ............................... num_computed ..........
    lies in       private slots of the host  | leaving, being copied there | other blocks | free blocks
                                              '------------ window: blocks of the GPU -------------'

The request owns a fixed number of GPU blocks, its window, from its admission to its end. When a step needs more of them than are
free, the oldest ones are copied to the host. A block is overwritten only after its copy has arrived, so a move that fails is
repeated, and nothing is lost. Slots are taken when they are needed. All other pins of the host tier end by themselves, so a
request that the host can hold at all gets each of them in time.

Blocks of the window are never published: no other request finds them.
"""

from __future__ import annotations

from engine.errors import InternalError
from engine.kvcache.host_tier import HostTier, Slot
from engine.kvcache.moves import MoveList
from engine.kvcache.pool import BlockPool
from engine.plan import SpilledContext, gpu
from engine.request import Request


class Spill:
    """At most one request spills at a time, `owner`. It has as many blocks of `pool` as it was given."""

    def __init__(self, pool: BlockPool, host: HostTier, moves: MoveList, block_size: int) -> None:
        self._pool = pool
        self._host = host
        self._moves = moves
        self._size = block_size
        self.owner: Request | None = None
        self._slots: list[Slot] = []  # of the first blocks
        self._blocks: list[int] = []  # of the GPU, behind these
        self._leaving: list[Slot] = []  # slots to which the first of `_blocks` are being copied
        self._free: list[int] = []  # blocks of the window without content

    def start(self, request: Request, window: list[int]) -> None:
        """Give a request without any KV the blocks `window`, which the caller holds."""
        if self.owner is not None:
            raise InternalError(f"{request} cannot spill while {self.owner} does")
        self.owner = request
        self._free = window

    def reach(self, most: int) -> int:
        """Return the position up to which the request's next step may run, at most `most` tokens ahead.

        That is num_computed itself if blocks must leave the window first; their copies are then under way. The window has room
        for the step's tokens afterwards, and `context` includes them.
        """
        request = self._require_owner()
        start, window = request.num_computed, len(self._blocks) + len(self._free)
        full = start // self._size  # blocks that may leave
        end = min(start + most, request.num_tokens, (full + window) * self._size)
        needed = -(-end // self._size)
        missing = needed - len(self._slots) - window
        if missing > 0:
            self._leave(missing)
            return start
        while len(self._slots) + len(self._blocks) < needed:
            self._blocks.append(self._free.pop())
        return end

    def context(self) -> SpilledContext:
        """Return where the KV of the request lies."""
        return SpilledContext([slot.number for slot in self._slots], self._blocks.copy())

    def arrived(self, number: int, *, ok: bool) -> bool:
        """Note the end of a move to a slot of the host. Returns False if the slot is not of the request that spills."""
        at = next((at for at, slot in enumerate(self._leaving) if slot.number == number), None)
        if at is None:
            return False
        if not ok:
            self._moves.move(gpu(self._blocks[at]), self._host.place(self._leaving[at]))
            return True
        self._leaving[at].ready = True
        while self._leaving and self._leaving[0].ready:
            self._slots.append(self._leaving.pop(0))
            self._free.append(self._blocks.pop(0))
        return True

    def release(self, request: Request) -> None:
        """Give up all blocks and slots of a request, if it spills. Slots to which something is copied stay pinned until then."""
        if self.owner is not request:
            return
        for slot in [*self._slots, *(slot for slot in self._leaving if slot.ready)]:
            self._host.unpin(slot)
        for block in self.blocks():
            self._pool.drop(block, keep=False)
        self.owner = None
        self._slots, self._blocks, self._leaving, self._free = [], [], [], []

    def blocks(self) -> list[int]:
        """Return the blocks of the window."""
        return self._blocks + self._free

    def check(self) -> None:
        """Raise InternalError if a position of the request has no place, or if a place that is needed could be overwritten."""
        if self.owner is None:
            if self._slots or self._blocks or self._leaving or self._free:
                raise InternalError("there are blocks of a spilled context, and no request spills")
            return
        if self.owner.num_computed > (len(self._slots) + len(self._blocks)) * self._size:
            raise InternalError(f"{self.owner} has computed more than its blocks and slots hold")
        if (len(self._slots) + len(self._leaving)) * self._size > self.owner.num_computed:
            raise InternalError(f"a block of {self.owner} leaves the window before it is full")
        if any(not slot.ready or slot.pins < 1 for slot in self._slots):
            raise InternalError(f"a slot of {self.owner} is not pinned, or its content has not arrived")
        if self.owner.blocks:
            raise InternalError(f"{self.owner} spills, and has a block table")

    def _leave(self, num: int) -> None:
        """Have `num` blocks in all leave the window, the oldest first, as far as the host has slots for them now."""
        while len(self._leaving) < num:
            slot = self._host.take_private()
            if slot is None:
                return
            self._moves.move(gpu(self._blocks[len(self._leaving)]), self._host.place(slot))
            self._leaving.append(slot)

    def _require_owner(self) -> Request:
        if self.owner is None:
            raise InternalError("no request spills")
        return self.owner
