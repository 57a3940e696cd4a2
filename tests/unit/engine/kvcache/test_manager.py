"""Tests of KVCacheManager: which blocks requests get, share, publish and release."""

import pytest

from engine.errors import InternalError
from engine.kvcache.manager import KVCacheManager
from engine.plan import BlockCopy, Tier, gpu
from engine.request import Request, SamplingParams


def make_request(tokens: list[int], name: str = "r", salt: str = "") -> Request:
    return Request(
        name, list(tokens), SamplingParams(max_tokens=50), num_prompt=len(tokens), seed=0, max_model_len=1000, salt=salt
    )


def computed(manager: KVCacheManager, tokens: list[int], name: str = "r", salt: str = "") -> Request:
    """Return an admitted request whose whole prompt is in submitted steps."""
    request = make_request(tokens, name, salt)
    assert manager.admit(request)
    request.num_computed = len(tokens)
    manager.publish(request)
    return request


def test_admit_gives_blocks_for_all_tokens_and_release_returns_them():
    manager = KVCacheManager(10, 4)
    request = computed(manager, list(range(9)))
    assert len(request.blocks) == 3
    assert (manager.num_used, manager.num_cached) == (3, 2)
    manager.check([request])
    manager.release(request)
    assert (manager.num_used, manager.num_cached) == (0, 2)
    manager.check([])


@pytest.mark.parametrize(("length", "shared"), [(8, 1), (9, 2), (4, 0), (5, 1)])
def test_the_last_token_of_a_cached_prompt_is_computed_in_a_block_of_its_own(length, shared):
    manager = KVCacheManager(20, 4)
    first = computed(manager, list(range(length)), "a")
    second = make_request(list(range(length)), "b")
    assert manager.admit(second)
    assert second.num_computed == shared * 4 < length
    assert second.blocks[:shared] == first.blocks[:shared]
    assert not set(second.blocks[shared:]) & set(first.blocks)
    manager.check([first, second])


def test_requests_with_different_salts_share_nothing():
    manager = KVCacheManager(20, 4)
    computed(manager, list(range(12)), "a", salt="x")
    other = make_request(list(range(12)), "b", salt="y")
    assert manager.admit(other)
    assert other.num_computed == 0


def test_admit_changes_nothing_if_blocks_are_short():
    manager = KVCacheManager(4, 4)
    computed(manager, list(range(8)), "a")
    big = make_request([*range(8), *range(50, 60)], "b")
    assert not manager.admit(big)
    assert (big.blocks, big.num_computed, manager.num_free) == ([], 0, 2)
    assert not manager.admit(make_request([70], "c"), spare=2)
    assert manager.admit(make_request([70], "c"), spare=1)


def test_a_free_cached_block_that_is_matched_does_not_count_as_free():
    manager = KVCacheManager(3, 4)
    first = computed(manager, list(range(12)), "a")
    manager.release(first)
    again = make_request([*range(12), 99], "b")
    assert not manager.admit(again)  # the request needs the three matched blocks and one more, but the cache has only three
    assert manager.admit(make_request(list(range(12)), "c"))


def twins(manager: KVCacheManager, num: int, length: int) -> list[Request]:
    """Return requests that have computed the same tokens, each in its own blocks. The first request's blocks are matched."""
    requests = [make_request(list(range(length)), f"twin{i}") for i in range(num)]
    for request in requests:
        assert manager.admit(request)
    for request in requests:
        assert request.num_computed == 0
        request.num_computed = length
        manager.publish(request)
    return requests


def evict_free_blocks(manager: KVCacheManager) -> None:
    """Evict the content of every block that no request holds, by giving all free blocks to another request for a moment."""
    filler = make_request(list(range(5000, 5000 + 4 * manager.num_free)), "filler")
    assert manager.admit(filler)
    assert manager.num_free == 0
    manager.release(filler)


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize("survivor", [0, 1, -1])
@pytest.mark.parametrize("survivor_runs", [False, True])
def test_the_survivor_of_requests_computed_side_by_side_keeps_the_prefix(num, survivor, survivor_runs):
    """All other requests end and their blocks are evicted. A later request still finds the survivor's blocks.

    This holds while the survivor runs, and after it has ended.
    """
    manager = KVCacheManager(40, 4)
    requests = twins(manager, num, 17)
    last = requests.pop(survivor)
    for request in requests:
        manager.release(request)
    evict_free_blocks(manager)
    manager.check([last])
    if not survivor_runs:
        manager.release(last)
    following = make_request([*range(17), 70, 71, 72], "following turn")
    assert manager.admit(following)
    assert following.num_computed == 16


def test_an_evicted_part_of_a_twin_is_replaced_by_the_survivors_blocks():
    manager = KVCacheManager(12, 4)
    first, second = twins(manager, 2, 20)
    manager.release(first)
    other = make_request([90] * 16, "other")  # takes the two blocks that were never used, and two of the first twin's
    assert manager.admit(other)
    manager.release(second)
    assert manager.match(make_request([*range(20), 1], "again")) == 5
    manager.check([other])


def test_the_end_of_a_chain_is_evicted_before_its_beginning():
    manager = KVCacheManager(4, 4)
    manager.release(computed(manager, list(range(16)), "a"))
    other = make_request([90] * 8, "b")
    assert manager.admit(other)
    manager.release(other)
    again = make_request(list(range(16)), "c")
    assert manager.admit(again)
    assert again.num_computed == 8


def test_extend_appends_a_block_and_publishes_the_full_ones():
    manager = KVCacheManager(3, 4)
    request = computed(manager, [1, 2, 3])
    request.tokens.extend([4])
    request.num_computed = 4
    block = manager.extend(request)
    assert request.blocks[-1] == block
    assert manager.num_cached == 1
    request.tokens.extend([5, 6, 7, 8])
    request.num_computed = 8
    assert manager.extend(request) is not None
    request.tokens.extend([9, 9, 9, 9])
    request.num_computed = 12
    assert manager.extend(request) is None
    manager.check([request])


@pytest.mark.parametrize(("length", "shared", "copied"), [(10, 2, True), (9, 2, False), (8, 1, True), (1, 0, False)])
def test_fork_shares_full_blocks_and_copies_the_partial_one(length, shared, copied):
    manager = KVCacheManager(20, 4)
    leader = computed(manager, list(range(length)), "a")
    sibling = make_request(list(range(length)), "b")
    assert manager.fork(sibling, leader)
    copies = manager.take_copies()
    assert sibling.num_computed == length - 1
    assert sibling.blocks[:shared] == leader.blocks[:shared]
    assert not set(sibling.blocks[shared:]) & set(leader.blocks)
    assert copies == ([BlockCopy(gpu(leader.blocks[shared]), gpu(sibling.blocks[shared]))] if copied else [])
    assert manager.take_copies() == []
    manager.check([leader, sibling])
    manager.release(leader)
    manager.check([sibling])
    manager.release(sibling)
    assert manager.num_used == 0


def test_a_preempted_request_finds_its_own_blocks_again():
    manager = KVCacheManager(8, 4)
    request = computed(manager, list(range(10)))
    manager.release(request)
    assert request.num_computed == 0
    assert manager.admit(request)
    assert request.num_computed == 8


def test_without_prefix_caching_nothing_is_shared_or_findable():
    manager = KVCacheManager(8, 4, prefix_caching=False)
    computed(manager, list(range(8)), "a")
    second = make_request(list(range(8)), "b")
    assert manager.admit(second)
    assert (second.num_computed, manager.num_cached) == (0, 0)


def test_nothing_is_remembered_of_requests_that_have_ended():
    manager = KVCacheManager(2, 4)
    manager.release(computed(manager, list(range(8)), "a"))
    waiting = make_request(list(range(100)), "b")
    assert not manager.admit(waiting)
    manager.release(waiting)
    assert not manager._chains


def test_check_finds_a_lost_block_and_a_shared_block_that_would_be_written():
    manager = KVCacheManager(8, 4)
    first = computed(manager, list(range(8)), "a")
    with pytest.raises(InternalError):
        manager.check([])
    first.num_computed = 4
    with pytest.raises(InternalError):
        manager.check([first])


@pytest.mark.parametrize("match", [True, False])
def test_after_a_reset_a_running_request_goes_on_and_publishes_nothing_more(match):
    manager = KVCacheManager(20, 4)
    request = make_request(list(range(14)), "running")
    assert manager.admit(request, match=match)
    request.num_computed = 6
    if match:
        manager.publish(request)
    assert manager.reset([Tier.GPU]) == {Tier.GPU: int(match)}
    request.num_computed = 14
    manager.publish(request)
    other = make_request(list(range(14)), "other")
    assert (manager.num_cached, manager.match(other), manager.next_digest(request)) == (0, 0, None)
    manager.release(request)
    assert (manager.num_cached, manager.num_used) == (0, 0)
    manager.check([])

    again = computed(manager, list(range(14)), "again")
    assert (again.num_computed, manager.num_cached, manager.match(other)) == (14, 3, 3)
    manager.check([again])


def test_a_waiting_request_forgets_what_it_was_matched_with_before_a_reset():
    manager = KVCacheManager(20, 4)
    first = computed(manager, list(range(14)), "first")
    waiting = make_request(list(range(14)), "waiting")
    assert manager.match(waiting) == 3
    manager.reset([Tier.GPU])
    assert manager.admit(waiting)
    assert waiting.num_computed == 0
    assert not set(waiting.blocks) & set(first.blocks)
    manager.check([first, waiting])
