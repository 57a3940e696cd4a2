"""Tests of BlockPool: the order in which free blocks are taken, and the errors that `check` finds."""

import random

import pytest

from engine.errors import InternalError
from engine.kvcache.pool import BlockPool


def test_blocks_are_taken_least_recently_used_first():
    pool = BlockPool(3)
    a, b, c = pool.take(), pool.take(), pool.take()
    for block in (b, c, a):
        pool.drop(block, keep=True)
    assert [pool.take() for _ in range(3)] == [b, c, a]


def test_a_block_dropped_without_keep_is_taken_first():
    pool = BlockPool(3)
    a, b = pool.take(), pool.take()
    pool.drop(a, keep=True)
    pool.drop(b, keep=False)
    assert pool.take() == b


def test_a_held_block_is_free_again_once_its_last_holder_drops_it():
    pool = BlockPool(2)
    block = pool.take()
    pool.drop(block, keep=True)
    pool.hold(block)
    pool.hold(block)
    assert pool.num_free == 1
    pool.drop(block, keep=True)
    assert pool.num_free == 1
    pool.drop(block, keep=True)
    assert pool.num_free == 2
    pool.check()


def test_taking_from_an_empty_pool_and_dropping_twice_are_errors():
    pool = BlockPool(1)
    block = pool.take()
    with pytest.raises(InternalError):
        pool.take()
    pool.drop(block, keep=True)
    with pytest.raises(InternalError):
        pool.drop(block, keep=True)


def test_check_finds_a_wrong_count():
    pool = BlockPool(4)
    pool.take()
    pool.num_free += 1
    with pytest.raises(InternalError):
        pool.check()


def test_random_operations_agree_with_a_plain_list():
    rng = random.Random(0)
    pool, free, refs = BlockPool(8), list(range(8)), [0] * 8
    for _ in range(3000):
        held = [b for b in range(8) if refs[b]]
        action = rng.choice("thd")
        if action == "t" and free:
            block = pool.take()
            assert block == free.pop(0)
            refs[block] = 1
        elif action == "h":
            block = rng.randrange(8)
            pool.hold(block)
            if refs[block] == 0:
                free.remove(block)
            refs[block] += 1
        elif action == "d" and held:
            block, keep = rng.choice(held), rng.random() < 0.5
            pool.drop(block, keep=keep)
            refs[block] -= 1
            if refs[block] == 0:
                free.insert(len(free) if keep else 0, block)
        assert pool.num_free == len(free)
        assert pool.refs == refs
        pool.check()
