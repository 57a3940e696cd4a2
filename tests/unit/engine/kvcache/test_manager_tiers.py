"""Tests of KVCacheManager with a host tier: what is demoted, what is loaded, and who holds what meanwhile."""

import pytest

from engine.kvcache.manager import KVCacheManager
from engine.kvcache.prefix import PrefixIndex
from engine.plan import Arrival, Tier
from engine.request import Request
from tests.unit.engine.kvcache.test_manager import computed, evict_free_blocks, make_request

A = list(range(100, 117))  # four full blocks and one token


def settle(manager: KVCacheManager, *, ok: bool = True) -> list[Request]:
    """Let all moves that are planned arrive. Returns the requests whose loads ended."""
    return manager.arrived([Arrival(copy.dst, ok) for copy in manager.take_copies() if copy.is_move])


def demoted(*, blocks: int = 8, slots: int = 20) -> KVCacheManager:
    """Return a manager that has the blocks of A in the host tier alone."""
    manager = KVCacheManager(blocks, 4, host_slots=slots)
    manager.release(computed(manager, A, "first"))
    evict_free_blocks(manager)
    settle(manager)
    manager.check([])
    return manager


def test_a_published_block_that_is_overwritten_goes_to_the_host_and_an_unpublished_one_is_lost():
    manager = KVCacheManager(8, 4, host_slots=20)
    request = computed(manager, A)
    blocks = request.blocks[:4]
    manager.release(request)
    evict_free_blocks(manager)
    copies = manager.take_copies()
    assert sorted((copy.src.tier, copy.src.number) for copy in copies) == sorted((Tier.GPU, block) for block in blocks)
    assert {copy.dst.tier for copy in copies} == {Tier.HOST}
    assert len({copy.dst.number for copy in copies}) == 4
    assert (manager.num_moving, len(manager.tiers.host)) == (4, 4)


def test_content_that_the_host_has_is_not_moved_there_again():
    manager = demoted()
    request = make_request(A, "again")
    assert manager.load(request)
    settle(manager)
    assert manager.admit(request)
    manager.release(request)
    evict_free_blocks(manager)
    assert manager.take_copies() == []
    assert len(manager.tiers.host) == 4


def test_a_waiting_request_loads_its_prefix_and_is_admitted_with_it():
    manager = demoted()
    request = make_request(A, "again")
    assert manager.match(request) == 0
    assert manager.load(request)
    assert not manager.load(request)
    assert (manager.is_loading(request), manager.num_held(request), manager.num_loading) == (True, 4, 4)
    manager.check([])
    assert settle(manager) == [request]
    assert manager.holders() == [request]
    manager.check([])
    assert manager.match(request) == 4
    assert manager.admit(request)
    assert (request.num_computed, manager.num_held(request)) == (16, 0)
    manager.check([request])


def test_what_is_loaded_is_held_until_the_admission_unless_it_is_given_back():
    manager = demoted()
    request = make_request(A, "again")
    manager.load(request)
    settle(manager)
    assert manager.num_free == 4
    assert not manager.admit(make_request(list(range(20)), "five blocks"))
    manager.give_back(request)
    assert (manager.num_free, manager.holders()) == (8, [])
    assert manager.match(request) == 4  # it is still there
    manager.check([])


def test_a_load_begins_only_if_the_whole_request_fits():
    manager = demoted()
    holder = computed(manager, list(range(16)), "holder")
    settle(manager)
    assert not manager.load(make_request(A, "again"))
    manager.release(holder)
    request = make_request(A, "once more")
    assert not manager.load(request, spare=4)
    assert manager.load(request, spare=3)


def test_a_block_on_its_way_to_the_host_is_not_loaded_before_it_is_there():
    manager = KVCacheManager(8, 4, host_slots=20)
    manager.release(computed(manager, A, "first"))
    evict_free_blocks(manager)
    request = make_request(A, "again")
    assert not manager.load(request)
    settle(manager)
    assert manager.load(request)


@pytest.mark.parametrize("failing", range(4))
def test_a_move_that_fails_ends_the_prefix_there(failing):
    manager = demoted()
    request = make_request(A, "again")
    manager.load(request)
    copies = manager.take_copies()
    loaded = [manager.arrived([Arrival(copy.dst, i != failing)]) for i, copy in enumerate(copies)]
    assert loaded == [[], [], [], [request]]
    manager.check([])
    assert (manager.num_held(request), len(manager.tiers.host)) == (failing, 3)
    assert not manager.load(request)  # the block that failed must be computed
    assert manager.admit(request)
    assert request.num_computed == 4 * failing
    manager.check([request])


def test_a_request_that_ends_while_it_loads_keeps_its_blocks_until_the_moves_have_arrived():
    manager = demoted()
    request = make_request(A, "again")
    manager.load(request)
    manager.release(request)
    assert (manager.num_free, manager.holders(), manager.num_loading) == (4, [], 4)
    manager.check([])
    assert settle(manager) == []
    assert (manager.num_free, manager.num_loading) == (8, 0)
    assert manager.match(make_request(A, "another")) == 4  # what came is of use to others
    manager.check([])


def test_a_second_request_waits_for_the_load_of_the_first():
    manager = demoted(blocks=16)
    first, second = make_request(A, "first"), make_request([*A, 1, 2, 3], "second")
    manager.load(first)
    assert manager.awaits_load(second)
    assert not manager.load(second)
    settle(manager)
    assert not manager.awaits_load(second)
    assert manager.match(second) == 4


@pytest.mark.parametrize("when", ["in the host", "loading", "loaded"])
def test_a_withdrawal_reaches_the_host_and_what_is_loaded(when):
    manager = demoted()
    request = make_request(A, "again")
    if when != "in the host":
        manager.load(request)
    if when == "loaded":
        settle(manager)
    bad = make_request(A[:8], "bad")
    manager.withdraw(bad)
    manager.release(bad)
    settle(manager)
    assert (len(manager.tiers.host), manager.num_cached, manager.num_held(request), manager.num_free) == (0, 0, 0, 8)
    manager.check([])
    assert manager.admit(request)
    assert request.num_computed == 0


def test_a_reset_of_one_tier_leaves_the_other():
    manager = demoted()
    request = make_request(A, "again")
    manager.load(request)
    settle(manager)
    assert manager.reset([Tier.HOST]) == {Tier.HOST: 4}
    assert (manager.match(request), len(manager.tiers.host)) == (4, 0)
    manager.check([])
    assert manager.reset([Tier.HOST, Tier.GPU]) == {Tier.HOST: 0, Tier.GPU: 4}
    assert (manager.match(request), manager.reach(request), manager.num_held(request), manager.num_free) == (0, 0, 0, 8)
    manager.check([])

    manager = demoted()
    manager.release(computed(manager, [1, 2, 3, 4, 5], "other"))
    assert manager.reset([Tier.GPU]) == {Tier.GPU: 1}
    assert manager.reach(make_request(A, "again")) == 4


@pytest.mark.parametrize("ok", [True, False])
def test_what_is_moving_during_a_reset_is_dropped_when_it_arrives(ok):
    manager = demoted()
    request = make_request(A, "again")
    manager.load(request)
    manager.reset([Tier.GPU, Tier.HOST])
    assert manager.is_loading(request)
    manager.check([])
    assert settle(manager, ok=ok) == [request]
    assert (len(manager.tiers.host), manager.num_cached, manager.num_held(request), manager.num_free) == (0, 0, 0, 8)

    manager.release(computed(manager, A, "down"))
    evict_free_blocks(manager)
    manager.reset([Tier.GPU, Tier.HOST])
    assert manager.num_moving > 0
    settle(manager, ok=ok)
    assert (len(manager.tiers.host), manager.num_moving) == (0, 0)
    manager.check([])
    assert manager.admit(request)
    assert request.num_computed == 0


def test_the_end_of_a_prefix_leaves_the_host_before_its_beginning():
    manager = demoted(slots=4)
    request = make_request(A, "again")
    manager.load(request)
    settle(manager)
    manager.release(request)
    other = computed(manager, list(range(8)), "other")
    manager.release(other)
    evict_free_blocks(manager)
    settle(manager)
    manager.check([])
    again = make_request(A, "once more")
    assert manager.load(again)
    assert manager.num_held(again) == 2


def test_what_a_waiting_request_still_needs_is_counted_without_what_it_holds():
    manager = demoted()
    request = make_request(A, "again")
    assert manager.num_needed(request) == 5
    manager.load(request)
    assert manager.num_needed(request) == 1
    settle(manager)
    assert manager.num_needed(request) == 1
    manager.give_back(request)
    assert manager.num_needed(request) == 5


def test_a_long_match_is_not_walked_through_if_the_host_has_nothing_behind_it(monkeypatch):
    manager = KVCacheManager(16, 4, host_slots=20)
    manager.release(computed(manager, A, "first"))
    request = make_request([*A, 7, 8, 9, 10], "longer")
    monkeypatch.setattr(PrefixIndex, "verify", lambda *_: pytest.fail("the whole match was checked"))
    assert not manager.load(request)
