"""Tests where the KV of a request lies whose context is larger than the GPU's cache, and what of it is pinned."""

import pytest

from engine.errors import InternalError
from engine.kvcache.host_tier import HostTier
from engine.kvcache.manager import KVCacheManager
from engine.kvcache.moves import MoveList
from engine.kvcache.pool import BlockPool
from engine.kvcache.spill import Spill
from engine.plan import Arrival, BlockCopy, PoolKind, gpu, host
from tests.unit.engine.scheduler.rig import make_request

SIZE, WINDOW = 4, 5


class Parts:
    """A Spill of a window of 5 blocks of 4 tokens, over a pool of 8 blocks, and a host tier."""

    def __init__(self, *, num_prompt=60, slots=20):
        self.pool, self.host, self.moves = BlockPool(8), HostTier(slots), MoveList()
        self.spill = Spill(self.pool, self.host, self.moves, SIZE)
        self.request = make_request("long", num_prompt=num_prompt, max_tokens=30)
        self.spill.start(self.request, [self.pool.take() for _ in range(WINDOW)])

    def run(self, most):
        """Let a step run as far as it may. Returns the position up to which it runs."""
        self.request.num_computed = end = self.spill.reach(most)
        self.check()
        return end

    def arrive(self, *, ok=True):
        """End all moves that wait for a plan, in reverse order. Returns the copies."""
        copies = self.moves.take()
        for copy in reversed(copies):
            assert self.spill.arrived(copy.dst.number, ok=ok)
        self.check()
        return copies

    def check(self):
        self.spill.check()
        self.host.check()
        self.pool.check()


def test_the_oldest_blocks_leave_the_window_before_their_blocks_are_used_again():
    parts = Parts()
    assert parts.run(most=100) == WINDOW * SIZE
    first = parts.spill.context()
    assert first.slots == []
    assert len(first.blocks) == WINDOW
    assert parts.run(most=7) == WINDOW * SIZE  # two blocks must leave first
    assert parts.run(most=7) == WINDOW * SIZE  # and are not moved twice
    copies = parts.arrive()
    assert copies == [BlockCopy(gpu(block), host(slot)) for block, slot in zip(first.blocks, (0, 1), strict=False)]
    assert parts.run(most=7) == WINDOW * SIZE + 7
    context = parts.spill.context()
    assert context.slots == [0, 1]
    assert context.blocks[:3] == first.blocks[2:]
    assert sorted(context.blocks) == sorted(first.blocks)


def test_blocks_are_used_again_only_up_to_the_first_whose_move_has_not_arrived():
    parts = Parts()
    parts.run(most=100)
    parts.run(most=8)
    first, second = parts.moves.take()
    assert parts.spill.arrived(second.dst.number, ok=True)
    assert parts.spill.context().slots == []
    assert parts.run(most=1) == WINDOW * SIZE
    assert parts.spill.arrived(first.dst.number, ok=True)
    assert parts.spill.context().slots == [first.dst.number, second.dst.number]


def test_a_move_that_fails_is_repeated_and_nothing_is_lost():
    parts = Parts()
    parts.run(most=100)
    parts.run(most=4)
    (failed,) = parts.arrive(ok=False)
    assert parts.spill.context().slots == []
    assert parts.run(most=4) == WINDOW * SIZE
    assert parts.arrive() == [failed]
    assert parts.run(most=4) == WINDOW * SIZE + 4


def test_a_chunk_is_as_long_as_the_window_allows_behind_a_block_that_is_not_full():
    parts = Parts()
    parts.run(most=18)  # the fifth block has 2 tokens
    parts.run(most=100)
    parts.arrive()
    assert parts.run(most=100) == 16 + WINDOW * SIZE
    assert len(parts.spill.context().slots) == 4


def test_a_step_waits_while_all_slots_of_the_host_are_pinned():
    parts = Parts(slots=2)
    slots = [parts.host.take(bytes([i]) * 16, b"f", -1) for i in range(2)]
    parts.run(most=100)
    assert parts.run(most=4) == WINDOW * SIZE
    assert len(parts.moves) == 0
    parts.host.arrived(slots[0].number, ok=True)
    parts.run(most=4)
    parts.arrive()
    assert parts.run(most=4) == WINDOW * SIZE + 4


def test_released_blocks_and_slots_are_free_again_once_moves_to_them_have_arrived():
    parts = Parts()
    parts.run(most=100)
    parts.run(most=4)
    parts.arrive()
    parts.run(most=4)
    parts.run(most=4)
    (copy,) = parts.moves.take()
    assert len(parts.host) == 2
    parts.spill.release(parts.request)
    parts.check()
    assert parts.pool.num_free == 8
    assert len(parts.host) == 1
    assert not parts.spill.arrived(copy.dst.number, ok=True)
    parts.host.arrived(copy.dst.number, ok=True)
    assert len(parts.host) == 0
    parts.check()


def test_a_slot_that_arrived_before_an_older_one_is_free_when_its_request_is_released():
    parts = Parts()
    parts.run(most=100)
    parts.run(most=8)
    older, newer = parts.moves.take()
    parts.spill.arrived(newer.dst.number, ok=True)
    parts.spill.release(parts.request)
    parts.check()
    assert len(parts.host) == 1
    assert parts.host.moving(older.dst.number).pins == 1


def test_two_requests_cannot_spill_at_a_time():
    parts = Parts()
    with pytest.raises(InternalError, match="cannot spill while"):
        parts.spill.start(make_request("other"), [])


def manager(**options):
    return KVCacheManager(20, SIZE, **{"host_slots": 30, "resident_tokens": 8} | options)


def spilling(num_prompt=100, max_tokens=21):
    request = make_request("long", num_prompt=num_prompt, max_tokens=max_tokens)
    request.spills = True
    return request


@pytest.mark.parametrize(
    ("num_prompt", "spare", "window"),
    [
        (100, 0, 10),  # half of the free blocks
        (100, 16, 3),  # as many as 8 tokens need, the newest block having one of them
        (100, 18, None),
        (180, 0, 20),  # 50 blocks, of which the host holds 30
        (180, 1, None),
    ],
)
def test_the_window_is_half_of_the_free_blocks_or_what_the_host_and_the_newest_tokens_need(num_prompt, spare, window):
    cache = manager()
    admitted = cache.admit_spilling(spilling(num_prompt), spare=spare)
    assert admitted is (window is not None)
    assert cache.num_used == (window or 0)


def test_the_window_may_be_the_whole_cache_but_not_more():
    cache = manager(resident_tokens=1000)
    assert cache.admit_spilling(spilling())
    assert cache.num_used == 20


@pytest.mark.parametrize(("kinds", "blocks"), [((PoolKind("token"),), 50), ((PoolKind("token"), PoolKind("state")), 20)])
def test_only_records_of_tokens_may_lie_in_the_host(kinds, blocks):
    assert manager(kinds=kinds).max_blocks == blocks


def test_a_request_outgrows_the_cache_with_tokens_that_are_not_committed_yet():
    cache, request = manager(), make_request("a", num_prompt=80)
    assert not cache.outgrows(request)
    request.num_uncommitted = 1
    assert cache.outgrows(request)


def test_nothing_of_a_spilled_context_is_published():
    cache, request = manager(), spilling()
    cache.admit_spilling(request)
    request.num_computed = cache.spill_reach(40)
    cache.release(request)
    assert cache.num_cached == 0
    assert cache.num_used == 0
    assert cache.arrived([Arrival(copy.dst, True) for copy in cache.take_copies()]) == []
    cache.check([])
