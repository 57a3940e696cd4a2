"""Tests of PrefixIndex: which blocks of a prompt are found, and which are not found any more."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InternalError
from engine.kvcache.chain import HASH_AHEAD, Chain
from engine.kvcache.identity import BlockIdentity
from engine.kvcache.prefix import PrefixIndex

SIZE = 4
IDENTITY = BlockIdentity(SIZE, key=b"a key of these tests")


def make_chain(tokens: list[int], salt: str = "") -> Chain:
    return Chain(IDENTITY, salt, array("i", tokens))


def publish(index: PrefixIndex, tokens: list[int], blocks: list[int], salt: str = "") -> Chain:
    chain = make_chain(tokens, salt)
    index.publish(chain, blocks, len(blocks))
    return chain


def matched(index: PrefixIndex, chain: Chain, limit: int = 100) -> list[int]:
    index.match(chain, limit)
    return [entry.block for entry in chain.matched]


def found(index: PrefixIndex, tokens: list[int], limit: int = 100, salt: str = "") -> list[int]:
    return matched(index, make_chain(tokens, salt), limit)


def test_a_published_chain_is_found_up_to_where_it_differs():
    index = PrefixIndex()
    publish(index, list(range(12)), [5, 6, 7])
    assert found(index, [*range(8), 99, 99, 99, 99]) == [5, 6]
    assert found(index, list(range(12)), limit=2) == [5, 6]
    assert found(index, [1, *range(11)]) == []


def test_another_salt_finds_nothing():
    index = PrefixIndex()
    publish(index, list(range(8)), [0, 1], "a")
    assert found(index, list(range(8)), salt="b") == []
    assert found(index, list(range(8)), salt="a") == [0, 1]


def test_the_same_tokens_are_published_once_for_each_salt():
    index = PrefixIndex()
    publish(index, list(range(4)), [0], "a")
    publish(index, list(range(4)), [1], "b")
    assert found(index, list(range(4)), salt="a") == [0]
    assert found(index, list(range(4)), salt="b") == [1]


def test_digests_do_not_depend_on_when_they_are_made():
    tokens = list(range(SIZE * (2 * HASH_AHEAD + 3)))
    whole, growing = make_chain(tokens), make_chain([])
    whole.digest(2 * HASH_AHEAD + 2)
    for token in tokens:
        growing.tokens.append(token)
        growing.digest(len(growing.tokens) // SIZE)
    growing.digest(2 * HASH_AHEAD + 2)
    assert growing.digests == whole.digests


def test_a_prompt_is_hashed_no_further_than_it_is_matched():
    chain = make_chain(list(range(SIZE * 100 * HASH_AHEAD)))
    PrefixIndex().match(chain, 100 * HASH_AHEAD)
    assert len(chain.digests) == HASH_AHEAD


def test_a_withdrawal_takes_all_that_begins_with_the_first_block_and_nothing_else():
    index = PrefixIndex()
    publish(index, list(range(8)), [0, 1])
    publish(index, [*range(4), 9, 9, 9, 9], [0, 2])
    other = publish(index, [7] * 8, [3, 4])
    index.withdraw(make_chain(list(range(4))).digest(0))
    assert found(index, list(range(8))) == []
    assert found(index, [7] * 8) == [3, 4]
    assert len(index) == 2
    assert other.num_published == 2
    publish(index, list(range(4)), [5])
    assert found(index, list(range(8))) == [5]  # what was computed from the withdrawn block did not come back with the prefix
    publish(index, list(range(8)), [5, 6])
    assert found(index, list(range(8))) == [5, 6]
    assert 1 not in index
    index.check()


def test_a_withdrawal_takes_the_copies_and_ends_remembered_matches():
    index = PrefixIndex()
    publish(index, list(range(8)), [0, 1])
    second = publish(index, list(range(8)), [2, 3])
    waiting = make_chain(list(range(12)))
    assert matched(index, waiting) == [0, 1]
    index.withdraw(second.digests[0])
    assert [block in index for block in range(4)] == [False] * 4
    assert matched(index, waiting) == []
    second.digest(1)
    index.publish(second, [2, 3], 2)
    assert len(index) == 0  # a chain that was withdrawn publishes nothing more
    publish(index, list(range(8)), [4])  # the prefix is computed again, under a new entry
    assert matched(index, waiting) == [4]
    index.check()


def test_a_chain_whose_blocks_were_withdrawn_publishes_nothing_more():
    index = PrefixIndex()
    chain = publish(index, list(range(16)), [0, 1])
    index.withdraw(chain.digests[0])
    index.publish(chain, [0, 1, 2, 3], 4)
    assert len(index) == 0


def test_blocks_with_the_same_content_are_one_entry():
    index = PrefixIndex()
    publish(index, list(range(8)), [0, 1])
    publish(index, list(range(8)), [2, 3])
    assert len(index) == 2
    assert found(index, list(range(8))) == [0, 1]
    index.check()


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_content_is_found_until_the_last_block_that_holds_it_is_overwritten(order):
    index = PrefixIndex()
    publish(index, list(range(12)), [0, 2, 3])
    publish(index, list(range(12)), [1, 4, 5])
    for block in order[:1]:
        index.forget(block)
        index.check()
        assert found(index, list(range(12))) == [order[1], 2, 3]
    for block in (2, 3, 4, 5, order[1]):
        index.forget(block)
    assert found(index, list(range(12))) == []
    assert not any(block in index for block in range(6))
    index.check()


def test_a_match_is_continued_where_it_ended():
    index = PrefixIndex()
    waiting = make_chain(list(range(16)))
    assert matched(index, waiting) == []
    running = publish(index, list(range(16)), [0, 1])
    assert index.match(waiting, 4) == 2
    assert index.match(waiting, 4) == 0
    index.publish(running, [0, 1, 2, 3], 3)
    assert index.match(waiting, 4) == 1
    index.forget(2)
    assert matched(index, waiting) == [0, 1]
    index.forget(1)
    index.publish(make_chain(list(range(16))), [0, 7, 8], 3)
    assert matched(index, waiting) == [0, 7, 8]
    index.withdraw(waiting.digests[0])
    assert matched(index, waiting) == []


@pytest.mark.parametrize("gone", range(4))
def test_a_block_that_leaves_and_comes_back_makes_its_descendants_findable_again(gone):
    index, tokens = PrefixIndex(), list(range(16))
    publish(index, tokens, [0, 1, 2, 3])
    index.forget(gone)
    assert found(index, tokens) == [0, 1, 2, 3][:gone]
    chain = make_chain(tokens)
    index.put(chain.digest(gone), chain.digest(0), 9)
    expected = [0, 1, 2, 3]
    expected[gone] = 9
    assert found(index, tokens) == expected
    index.check()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 11)), max_size=60))
def test_what_is_found_is_the_prefix_whose_blocks_are_there(operations):
    """Blocks leave and come back in any order. A match, new or remembered and verified, is as long as no block is missing."""
    index, tokens, there = PrefixIndex(), list(range(12 * SIZE)), set()
    remembered = make_chain(tokens)
    for comes, at in operations:
        if comes:
            index.put(remembered.digest(at), remembered.digest(0), at)
            there.add(at)
        else:
            index.forget(at)
            there.discard(at)
        expected = list(range(next(i for i in range(13) if i not in there)))
        assert found(index, tokens) == expected
        index.match(remembered, 12)
        index.verify(remembered)
        assert [entry.block for entry in remembered.matched] == expected[: len(remembered.matched)]
        index.match(remembered, 12)
        assert [entry.block for entry in remembered.matched] == expected
        index.check()


@pytest.mark.parametrize("name", ["_by_block", "_by_digest"])
def test_check_finds_an_entry_in_a_wrong_place(name):
    index = PrefixIndex()
    publish(index, list(range(4)), [0])
    entries = getattr(index, name)
    key, entry = entries.popitem()
    entries[b"wrong" if isinstance(key, bytes) else 1] = entry
    with pytest.raises(InternalError):
        index.check()
