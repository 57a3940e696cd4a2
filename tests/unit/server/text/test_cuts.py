"""Tests of texts that are tokenised in pieces. The expected ids are always those of the library for the whole text."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.text import tokenizer as tokenizer_module
from server.text.cuts import pieces_of
from tests.support.tiny_checkpoint import CORPUS
from tests.unit.server.text.tokenizers_for_tests import ALL, CUT, NOT_CUT, RARELY_CUT, llama2_by_words

# Texts at which tokenizers join or divide characters: spaces of all kinds, marks, digits, quotes, added tokens, other scripts.
SPACES = [" ", "  ", "\n", "\r\n", "\t", "\u3000", "\u00a0", "\u180e", "\u2009", "\x1c", "▁", "\u0301", " \u0301", "\u200d"]
WORDS = [
    "a",
    "the",
    " tide",
    "Gate",
    "s",
    "'s",
    "'ll",
    "é",
    "e\u0301",
    "日本",
    "が",
    "か\u3099",
    "한",
    "\u1112\u1161",
    "ไทย",
    "x" * 9,
]
SIGNS = ["1", "234", "½", *'.,!-_/:<>|"(', "、", "。", "\uff0c", "\uff1a", "🌊", "\x00", "\ufffd", "\u2126", "ﬁ", "\u212b"]
ADDED = ["<|end|>", "<s>", "<mask>", "a, b", "tide-gate", "été", "日本 語", ". 1", "! a"]
PARTS = [*SPACES, *WORDS, *SIGNS, *ADDED]
TEXTS = st.lists(st.sampled_from(PARTS) | st.characters(exclude_categories=["Cs"]), max_size=30).map("".join)
CASES = pytest.mark.parametrize("make", (CUT | RARELY_CUT).values(), ids=CUT | RARELY_CUT)


def library_ids(tokenizer, text, special=False):
    return tokenizer._tokenizer.encode(text, add_special_tokens=special).ids


@CASES
@settings(deadline=None, max_examples=100)
@given(TEXTS, st.integers(1, 12))
@example(CORPUS, 1)
def test_the_pieces_have_the_ids_of_the_whole_text(make, text, piece_chars):
    tokenizer = make()
    pieces = list(pieces_of(text, tokenizer._cuts, piece_chars))
    ids = [id for piece in pieces for id in library_ids(tokenizer, piece)]
    assert ids == library_ids(tokenizer, text), pieces


@CASES
def test_every_pair_of_neighbours_has_the_ids_of_the_whole_text(make):
    tokenizer = make()
    encode = tokenizer._tokenizer.encode_batch_fast
    texts = [f"t{left}{right}a" for left in PARTS for right in PARTS]
    pieces = [list(pieces_of(text, tokenizer._cuts, 1)) for text in texts]
    of_pieces = iter(encode([piece for some in pieces for piece in some], add_special_tokens=False))
    for text, some, whole in zip(texts, pieces, encode(texts, add_special_tokens=False), strict=True):
        assert [id for _ in some for id in next(of_pieces).ids] == whole.ids, (text, some)


@pytest.mark.parametrize("make", CUT.values(), ids=CUT)
def test_an_ordinary_text_is_cut_often(make):
    text = "Hello there, the tide is in and the gate is open. 日本語、中文。 Twelve boats " * 20
    sizes = [len(piece) for piece in pieces_of(text, make()._cuts, 50)]
    assert len(sizes) > 15
    assert max(sizes) < 100


@pytest.mark.parametrize("make", NOT_CUT.values(), ids=NOT_CUT)
def test_a_tokenizer_without_a_proof_is_not_cut(make):
    text = "Hello there, the tide is in. " * 20
    tokenizer = make()
    assert tokenizer._cuts is None
    assert tokenizer.encode(text) == library_ids(tokenizer, text, special=True)


@pytest.mark.parametrize("make", (CUT | ALL).values(), ids=CUT | ALL)
@settings(deadline=None, max_examples=30)
@given(TEXTS)
def test_special_tokens_stand_around_the_whole_text_and_not_around_each_piece(make, text):
    tokenizer = make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "PIECE_CHARS", 3)
        assert tokenizer.encode(text) == library_ids(tokenizer, text, special=True)
        assert tokenizer.encode(text, add_special_tokens=False) == library_ids(tokenizer, text)


def test_a_cut_behind_a_dropped_space_keeps_the_space_in_the_ids():
    tokenizer = llama2_by_words()
    assert list(pieces_of("the tide gate", tokenizer._cuts, 1)) == ["the", "tide", "gate"]
    assert list(pieces_of("a <s>b", tokenizer._cuts, 1)) == ["a <s>b"]


@pytest.mark.parametrize("text", ["x" * 1000, "12" * 500, " " * 1000, "-" * 1000])
def test_a_text_of_one_word_is_one_piece(text):
    assert list(pieces_of(text, CUT["gpt2"]()._cuts, 10)) == [text]
