"""Tests the token sequences of bad words."""

import pytest

from engine.errors import InvalidRequest
from server.text.bad_words import bad_word_tokens
from tests.unit.server.text.tokenizers_for_tests import byte_level, gemma, llama2_by_words, metaspace_words


@pytest.mark.parametrize("make", [byte_level, gemma, llama2_by_words, lambda: metaspace_words("first", True)])
@pytest.mark.parametrize("word", ["tide", " tide", "the server", "é"])
def test_a_word_is_found_at_the_start_after_a_space_and_inside_of_a_word(make, word):
    tokenizer = make()
    found = bad_word_tokens(tokenizer, [word])
    bare = word.strip()
    for text in (word, f" {bare}", f"\n{bare}"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert any(tuple(ids[-len(sequence) :]) == sequence for sequence in found), text
    for sequence in found:
        assert tokenizer.decode(list(sequence)).strip() == bare


def test_a_word_of_white_space_is_taken_as_it_stands():
    tokenizer = byte_level()
    assert bad_word_tokens(tokenizer, ["\n"]) == (tuple(tokenizer.encode("\n", add_special_tokens=False)),)


def test_special_tokens_may_be_bad_words():
    assert (3,) in bad_word_tokens(byte_level(), ["<|user|>"])


def test_words_of_too_many_tokens_are_refused_by_their_place():
    with pytest.raises(InvalidRequest, match=r"bad_words\[1\] has .* tokens: at most 64") as caught:
        bad_word_tokens(byte_level(), ["x", "x1" * 100])
    assert caught.value.param == "bad_words"
