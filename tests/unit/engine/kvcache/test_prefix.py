from array import array

import pytest
import xxhash

from engine.errors import InternalError
from engine.kvcache.prefix import Chain, PrefixIndex

SIZE = 4


def make_chain(tokens: list[int], salt: str = "") -> Chain:
    chain = Chain(salt)
    chain.lengthen(array("i", tokens), SIZE, len(tokens) // SIZE)
    return chain


def test_a_filed_chain_is_found_up_to_where_it_differs():
    index = PrefixIndex()
    index.publish(make_chain(list(range(12))), [5, 6, 7])
    assert index.match(make_chain([*range(8), 99, 99, 99, 99]), 3)[0] == [5, 6]
    assert index.match(make_chain(list(range(12))), 2)[0] == [5, 6]
    assert index.match(make_chain([1, *range(11)]), 3)[0] == []


def test_another_salt_finds_nothing():
    index = PrefixIndex()
    index.publish(make_chain(list(range(8)), "a"), [0, 1])
    assert index.match(make_chain(list(range(8)), "b"), 2)[0] == []
    assert index.match(make_chain(list(range(8)), "a"), 2)[0] == [0, 1]


def test_the_same_tokens_are_kept_once_for_each_salt():
    index = PrefixIndex()
    index.publish(make_chain(list(range(4)), "a"), [0])
    index.publish(make_chain(list(range(4)), "b"), [1])
    assert index.match(make_chain(list(range(4)), "a"), 1)[0] == [0]
    assert index.match(make_chain(list(range(4)), "b"), 1)[0] == [1]


def test_lengthening_in_parts_gives_the_same_links():
    tokens = array("i", range(40))
    whole, parts = make_chain(tokens), Chain("")
    for num_blocks in (1, 4, 4, 10):
        parts.lengthen(tokens, SIZE, num_blocks)
    assert parts.links == whole.links


def test_a_forgotten_block_hides_what_hangs_from_it_even_after_the_prefix_is_filed_again():
    index = PrefixIndex()
    index.publish(make_chain(list(range(8))), [0, 1])
    index.forget(0)
    assert index.match(make_chain(list(range(8))), 2)[0] == []
    index.publish(make_chain(list(range(4))), [2])
    assert index.match(make_chain(list(range(8))), 2)[0] == [2]
    index.publish(make_chain(list(range(8))), [2, 3])
    assert index.match(make_chain(list(range(8))), 2)[0] == [2, 3]
    assert 1 not in index
    index.check()


def test_what_is_filed_already_is_not_filed_twice():
    index = PrefixIndex()
    index.publish(make_chain(list(range(8))), [0, 1])
    index.publish(make_chain(list(range(8))), [2, 3])
    assert len(index) == 2
    assert index.match(make_chain(list(range(8))), 2)[0] == [0, 1]


def test_colliding_hashes_never_serve_another_requests_blocks(monkeypatch):
    """With a hash that is always the same, only the comparison of tokens and parents is left."""
    monkeypatch.setattr(xxhash, "xxh3_128_digest", lambda data: b"same")
    index = PrefixIndex()
    index.publish(make_chain([1, 2, 3, 4]), [0])
    assert index.match(make_chain([1, 2, 3, 5]), 1)[0] == []
    assert index.match(make_chain([1, 2, 3, 4], "other salt"), 1)[0] == []
    assert index.match(make_chain([1, 2, 3, 4]), 1)[0] == [0]
    index.publish(make_chain([1, 2, 3, 5]), [1])
    assert index.match(make_chain([1, 2, 3, 4]), 1)[0] == []
    index.check()


def test_a_second_block_that_collides_is_not_matched_behind_another_first_block(monkeypatch):
    """The second blocks are equal in tokens and in hash; what comes before them is not."""
    real = xxhash.xxh3_128_digest
    monkeypatch.setattr(xxhash, "xxh3_128_digest", lambda data: real(data[-SIZE * 4 :]))
    index = PrefixIndex()
    index.publish(make_chain([1, 1, 1, 1, 9, 9, 9, 9]), [0, 1])
    index.publish(make_chain([2, 2, 2, 2]), [2])
    assert index.match(make_chain([2, 2, 2, 2, 9, 9, 9, 9]), 2)[0] == [2]
    assert index.match(make_chain([1, 1, 1, 1, 9, 9, 9, 9]), 2)[0] == [0, 1]


def test_check_finds_an_entry_under_a_wrong_block():
    index = PrefixIndex()
    index.publish(make_chain(list(range(4))), [0])
    index._by_block[1] = index._by_block.pop(0)
    with pytest.raises(InternalError):
        index.check()
