"""Tests of the lower bound on a text's number of tokens. The bound must never exceed the true number."""

import sys
import unicodedata
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers

from tests.unit.server.text.test_cuts import TEXTS, library_ids
from tests.unit.server.text.tokenizers_for_tests import (
    ALL,
    CUT,
    NOT_CUT,
    by_pattern,
    gemma,
    sentencepiece,
    with_added,
    with_merge,
)

OTHER_SPACES = {
    "byte level with meta": lambda: by_pattern(normalizer=normalizers.Replace(" ", "▁")),
    "metaspace of another character": lambda: with_merge(
        sentencepiece(None, pre_tokenizer=pre_tokenizers.Metaspace(replacement="_", split=False)), "_", "a"
    ),
}
EVERY = CUT | ALL | NOT_CUT | {name: cache(make) for name, make in OTHER_SPACES.items()}
DENSE = ["a ", "the tide ", "x", " ", "été ", "日本、", "\u2126", "\u1fbe\u0308\u0301", "<mask> ", "<|end|>      ", "🌊"]
LIMIT = 50


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
@settings(deadline=None, max_examples=25)
@given(st.lists(TEXTS | st.sampled_from(DENSE), max_size=6), st.integers(1, 40))
@example([" a"], 200)
@example([" the"], 200)
def test_a_text_that_fits_is_never_too_long(make, parts, times):
    tokenizer, text = make(), "".join(parts) * times
    assert not tokenizer.exceeds(text, len(library_ids(tokenizer, text)))


@pytest.mark.parametrize("make", [by_pattern, gemma, CUT["nfc"]], ids=["byte level", "gemma", "nfc"])
@pytest.mark.parametrize("unit", ["a ", "the tide is in. ", "x", "日本語"])
def test_a_text_far_too_long_is_known_without_tokenising(make, unit, monkeypatch):
    tokenizer = make()
    monkeypatch.setattr(tokenizer, "_tokenizer", None)
    assert tokenizer.exceeds(unit * 10_000, LIMIT)


def test_words_count_where_bytes_alone_do_not():
    tokenizer = by_pattern()
    limit = 3000
    text = "ab " * (limit + 10)
    assert len(text) < limit * tokenizer._bound.longest
    assert tokenizer.exceeds(text, limit)
    assert not tokenizer.exceeds("ab " * limit, limit)


@pytest.mark.parametrize("make", [by_pattern, gemma], ids=["byte level", "gemma"])
def test_one_long_word_counts_by_the_longest_token_with_its_letters(make):
    """In these vocabularies, every token with an "x" is shorter than the longest token. The text consists of "x" only."""
    tokenizer = make()
    limit = 30_000
    text = "x" * (8 * limit)
    assert len(text) < limit * tokenizer._bound.longest
    assert tokenizer.exceeds(text, limit)
    assert not tokenizer.exceeds(text, len(library_ids(tokenizer, text)))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: with_added(AddedToken("<mask>", rstrip=True)), "<mask>" + " " * 100_000),
        (lambda: with_added(AddedToken("<mask>", rstrip=True)), "<mask> x" * 20_000),
        (lambda: by_pattern(normalizer=normalizers.Strip()), " " * 100_000),
        (lambda: by_pattern(normalizer=normalizers.Replace("xx", "")), "x" * 100_000),
        (lambda: sentencepiece(None, pre_tokenizer=pre_tokenizers.WhitespaceSplit()), " " * 100_000),
        (NOT_CUT["unknown pre-tokenizer"], "q" * 100_000),
    ],
    ids=["spaces in a token", "a token with spaces", "stripped", "deleted", "dropped", "one unknown word"],
)
def test_there_is_no_bound_where_a_text_may_shrink_without_limit(make, text):
    tokenizer = make()
    assert not tokenizer.exceeds(text, LIMIT)
    num = len(library_ids(tokenizer, text))
    assert num <= LIMIT or not tokenizer.exceeds(text, num)


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_composing_shrinks_a_text_by_eight_at_most(form):
    """For every character, the canonical decomposition has at most 4 characters, and normalizing it never gives an empty text.

    The bound relies on both facts.
    """
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if unicodedata.category(character) == "Cs":
            continue
        assert len(unicodedata.normalize("NFD", character)) <= 4
        assert unicodedata.normalize(form, character)
