import subprocess
import sys
from array import array

import pytest
import xxhash

from engine.errors import InternalError
from engine.kvcache.prefix import HASH_AHEAD, Chain, PrefixIndex

SIZE = 4


def make_chain(tokens: list[int], salt: str = "") -> Chain:
    return Chain(salt, array("i", tokens))


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
    index = PrefixIndex(SIZE)
    publish(index, list(range(12)), [5, 6, 7])
    assert found(index, [*range(8), 99, 99, 99, 99]) == [5, 6]
    assert found(index, list(range(12)), limit=2) == [5, 6]
    assert found(index, [1, *range(11)]) == []


def test_another_salt_finds_nothing():
    index = PrefixIndex(SIZE)
    publish(index, list(range(8)), [0, 1], "a")
    assert found(index, list(range(8)), salt="b") == []
    assert found(index, list(range(8)), salt="a") == [0, 1]


def test_the_same_tokens_are_published_once_for_each_salt():
    index = PrefixIndex(SIZE)
    publish(index, list(range(4)), [0], "a")
    publish(index, list(range(4)), [1], "b")
    assert found(index, list(range(4)), salt="a") == [0]
    assert found(index, list(range(4)), salt="b") == [1]


def test_links_do_not_depend_on_when_they_are_made():
    tokens = list(range(SIZE * (2 * HASH_AHEAD + 3)))
    whole, growing = make_chain(tokens), make_chain([])
    whole.link(2 * HASH_AHEAD + 2, SIZE)
    for token in tokens:
        growing.tokens.append(token)
        growing.link(len(growing.tokens) // SIZE, SIZE)
    growing.link(2 * HASH_AHEAD + 2, SIZE)
    assert growing.links == whole.links


def test_a_prompt_is_hashed_no_further_than_it_is_matched():
    chain = make_chain(list(range(SIZE * 100 * HASH_AHEAD)))
    PrefixIndex(SIZE).match(chain, 100 * HASH_AHEAD)
    assert len(chain.links) == HASH_AHEAD


def test_two_processes_give_a_prompt_the_same_hashes():
    """Caches outside the engine may store blocks under these hashes, so the hashes must not depend on the process."""
    script = """
from array import array
from engine.kvcache.prefix import Chain
chain = Chain("salt", array("i", range(1000)))
print([chain.link(i, 64).digest.hex() for i in range(15)])
"""
    seeds = ("1", "2")
    printed = [
        subprocess.run([sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True).stdout
        for seed in seeds
    ]
    assert printed[0] == printed[1]
    assert len(printed[0]) > 15 * 32


def test_what_descends_from_withdrawn_blocks_is_not_found_even_after_the_prefix_is_published_again():
    index = PrefixIndex(SIZE)
    publish(index, list(range(8)), [0, 1])
    index.withdraw([0])
    assert found(index, list(range(8))) == []
    publish(index, list(range(4)), [2])
    assert found(index, list(range(8))) == [2]
    publish(index, list(range(8)), [2, 3])
    assert found(index, list(range(8))) == [2, 3]
    assert 1 not in index
    index.check()


def test_an_entry_does_not_outlive_a_withdrawal_by_its_copies():
    """The second chain would else hold no block of the first entry, and that entry could be evicted before the second one."""
    index = PrefixIndex(SIZE)
    publish(index, list(range(8)), [0, 1])
    second = publish(index, list(range(8)), [2, 3])
    waiting = make_chain(list(range(12)))
    assert matched(index, waiting) == [0, 1]
    index.withdraw([2])
    assert [block in index for block in range(4)] == [False, True, False, True]
    assert matched(index, waiting) == []
    index.publish(second, [2, 3], 2)
    publish(index, list(range(8)), [4])  # the prefix is computed again, under a new entry
    assert matched(index, waiting) == [4]
    index.check()


def test_a_chain_whose_blocks_were_withdrawn_publishes_nothing_more():
    index = PrefixIndex(SIZE)
    chain = publish(index, list(range(16)), [0, 1])
    index.withdraw([0, 1])
    index.publish(chain, [0, 1, 2, 3], 4)
    assert len(index) == 0


def test_blocks_with_the_same_content_are_one_entry():
    index = PrefixIndex(SIZE)
    publish(index, list(range(8)), [0, 1])
    publish(index, list(range(8)), [2, 3])
    assert len(index) == 2
    assert found(index, list(range(8))) == [0, 1]
    index.check()


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_content_is_found_until_the_last_block_that_holds_it_is_overwritten(order):
    index = PrefixIndex(SIZE)
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
    index = PrefixIndex(SIZE)
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
    index.withdraw([0])
    assert matched(index, waiting) == []


def test_colliding_hashes_never_serve_another_requests_blocks(monkeypatch):
    """All blocks have the same hash in this test, so only the comparison of token ids and parents finds the right block."""
    monkeypatch.setattr(xxhash, "xxh3_128_digest", lambda data: b"same")
    index = PrefixIndex(SIZE)
    publish(index, [1, 2, 3, 4], [0])
    assert found(index, [1, 2, 3, 5]) == []
    assert found(index, [1, 2, 3, 4], salt="other salt") == []
    assert found(index, [1, 2, 3, 4]) == [0]
    publish(index, [1, 2, 3, 5], [1])
    assert found(index, [1, 2, 3, 4]) == []
    index.check()


def test_a_second_block_that_collides_is_not_matched_behind_another_first_block(monkeypatch):
    """The second blocks of two prompts have equal tokens and equal hashes, but follow different first blocks."""
    real = xxhash.xxh3_128_digest
    monkeypatch.setattr(xxhash, "xxh3_128_digest", lambda data: real(data[-SIZE * 4 :]))
    index = PrefixIndex(SIZE)
    publish(index, [1, 1, 1, 1, 9, 9, 9, 9], [0, 1])
    publish(index, [2, 2, 2, 2], [2])
    assert found(index, [2, 2, 2, 2, 9, 9, 9, 9]) == [2]
    assert found(index, [1, 1, 1, 1, 9, 9, 9, 9]) == [0, 1]


@pytest.mark.parametrize("name", ["_by_block", "_by_digest"])
def test_check_finds_an_entry_in_a_wrong_place(name):
    index = PrefixIndex(SIZE)
    publish(index, list(range(4)), [0])
    entries = getattr(index, name)
    key, entry = entries.popitem()
    entries[b"wrong" if isinstance(key, bytes) else 1] = entry
    with pytest.raises(InternalError):
        index.check()


def test_check_finds_an_entry_that_outlived_its_parent():
    index = PrefixIndex(SIZE)
    publish(index, list(range(8)), [0, 1])
    index.forget(0)
    with pytest.raises(InternalError):
        index.check()
