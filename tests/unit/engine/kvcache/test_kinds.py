"""Tests of HitRule: a prefix counts exactly as far as every kind of pool has what the next token needs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kvcache.kinds import ALL, HitRule
from engine.kvcache.manager import KVCacheManager
from engine.plan import PER_TOKEN, PoolKind
from tests.unit.engine.kvcache.test_manager import make_request

SIZE = 4
TOKEN, STATE = PER_TOKEN[0], PoolKind("state")
KINDS = [TOKEN, PoolKind("window", 1), PoolKind("window", 5), PoolKind("window", 9), STATE]


def is_usable(kinds: list[PoolKind], masks: list[int]) -> bool:
    """Say by the definition whether the next token finds all that it needs in these blocks."""
    for bit, kind in enumerate(kinds):
        there = [bool(mask >> bit & 1) for mask in masks]
        if kind.name == "state":
            needed = there[-1:]
        elif kind.name == "window":
            first_token = max(0, len(masks) * SIZE - kind.window)
            needed = there[first_token // SIZE :]
        else:
            needed = there
        if not all(needed):
            return False
    return True


@given(st.data())
def test_the_longest_usable_prefix_is_found(data):
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))
    masks = data.draw(st.lists(st.integers(0, 2 ** len(kinds) - 1) | st.just(ALL), max_size=10))
    expected = max(num for num in range(len(masks) + 1) if is_usable(kinds, masks[:num]))
    assert HitRule(tuple(kinds), SIZE).longest(masks) == expected


@pytest.mark.parametrize(
    ("ends", "usable"), [([17], 0), ([16, 17], 4), ([8, 17], 2), ([6, 17], 0), ([4, 8, 17], 2), ([8, 13, 17], 2)]
)
def test_a_prefix_with_states_is_a_hit_up_to_where_a_slice_has_ended(ends, usable):
    manager, tokens = KVCacheManager(20, SIZE, kinds=(TOKEN, STATE)), list(range(17))
    request = make_request(tokens, "first")
    assert manager.admit(request)
    for end in ends:
        request.num_computed = end
        manager.publish(request)
    manager.check([request])
    again = make_request(tokens, "again")
    assert manager.match(again) == usable
    assert manager.admit(again)
    assert again.num_computed == usable * SIZE
    manager.check([request, again])


def test_a_block_whose_state_is_there_takes_the_place_of_one_without():
    """Two requests compute the same prompt side by side, in different slices."""
    manager, tokens = KVCacheManager(10, SIZE, kinds=(TOKEN, STATE)), list(range(9))
    first, second = make_request(tokens, "first"), make_request(tokens, "second")
    for request, ends in ((first, [9]), (second, [4, 8, 9])):
        assert manager.admit(request, match=False)
        for end in ends:
            request.num_computed = end
            manager.publish(request)
    waiting = make_request(tokens, "waiting")
    assert manager.match(waiting) == 2
    manager.release(second)
    filler = make_request(list(range(50, 50 + 4 * manager.num_free)), "filler")
    assert manager.admit(filler)
    manager.check([first, filler])
    assert manager.match(waiting) == 0  # only blocks without states are left
    assert not manager.admit(waiting)


def test_a_record_without_the_state_in_the_host_is_replaced_by_one_with_it():
    manager, tokens = KVCacheManager(4, SIZE, kinds=(TOKEN, STATE), host_slots=10), list(range(9))
    for ends in ([9], [8, 9]):
        request = make_request(tokens, f"{ends}")
        assert manager.admit(request)
        for end in ends:
            request.num_computed = end
            manager.publish(request)
        manager.release(request)
        filler = make_request(list(range(50, 66)), "filler")
        assert manager.admit(filler)
        manager.release(filler)
        manager.arrived([(copy.dst, True) for copy in manager.take_copies()])
        again = make_request(tokens, "again")
        assert manager.load(again) == (ends == [8, 9])
        manager.arrived([(copy.dst, True) for copy in manager.take_copies()])
        manager.release(again)
        manager.check([])


def test_only_prompts_without_states_can_be_forked():
    assert KVCacheManager(4, SIZE, kinds=(TOKEN, KINDS[2])).can_fork
    assert not KVCacheManager(4, SIZE, kinds=(STATE,)).can_fork
