import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.server.text.tokenizers_for_tests import ALL, byte_level, llama2, metaspace

CASES = pytest.mark.parametrize("make", ALL.values(), ids=ALL)
IDS = st.lists(st.integers(0, 760), max_size=40)  # some of them nobody knows
CUTS = st.lists(st.integers(1, 5), min_size=40, max_size=40)
EMOJI = "a🌊b 日本語 é"


def library_text(tokenizer, ids):
    return tokenizer._tokenizer.decode(ids, skip_special_tokens=True)


def pieces_of(detokenizer, ids, cuts):
    pieces = []
    for cut in cuts:
        pieces.append(detokenizer.add(ids[:cut]))
        ids = ids[cut:]
    return [*pieces, detokenizer.flush()]


@CASES
@settings(deadline=None)
@given(IDS, CUTS)
def test_the_pieces_joined_are_the_text_of_all_tokens(make, ids, cuts):
    tokenizer = make()
    text = library_text(tokenizer, ids)
    assert tokenizer.decode(ids) == text
    assert "".join(pieces_of(tokenizer.detokenizer(), ids, cuts)) == text


@pytest.mark.parametrize("make", [byte_level, llama2, metaspace])
@settings(deadline=None)
@given(st.lists(st.integers(0, 255), max_size=30), st.lists(st.integers(0, 760), max_size=4), CUTS)
def test_random_bytes_are_replaced_as_the_library_replaces_them(make, values, others, cuts):
    """Most of these are not UTF-8, with other tokens before and behind."""
    tokenizer = make()
    ids = others + [byte_token(tokenizer, value) for value in values] + others
    assert "".join(pieces_of(tokenizer.detokenizer(), ids, cuts)) == library_text(tokenizer, ids)


def byte_token(tokenizer, value):
    found = [id for id in range(tokenizer.vocab_size) if tokenizer.token_bytes(id) == bytes([value])]
    fallback = tokenizer._tokenizer.token_to_id(f"<0x{value:02X}>")
    return fallback if fallback is not None else found[0]


@CASES
@settings(max_examples=100, deadline=None)
@given(IDS, IDS, CUTS)
def test_behind_a_prompt_the_text_is_what_the_tokens_add_to_it(make, prompt, ids, cuts):
    tokenizer = make()
    prompt = tokenizer.encode("The tide. ") + prompt + tokenizer.encode("gate")
    whole = library_text(tokenizer, prompt + ids)
    text = "".join(pieces_of(tokenizer.detokenizer(prompt), ids, cuts))
    assert whole == library_text(tokenizer, prompt) + text


@pytest.mark.parametrize("make", [byte_level, llama2, metaspace])
def test_no_piece_ends_inside_a_character(make):
    tokenizer = make()
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.add([id]) for id in tokenizer.encode(EMOJI, add_special_tokens=False)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == EMOJI


def test_half_a_character_at_the_end_comes_with_the_flush():
    tokenizer = byte_level()
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.add([byte_token(tokenizer, 0xF0), byte_token(tokenizer, 0x9F)]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_the_space_before_the_first_word_is_kept_behind_a_prompt():
    tokenizer = llama2()
    prompt, word = tokenizer.encode("The capital of France is"), tokenizer.encode("Paris")
    assert tokenizer.detokenizer().add(word) == "Paris"
    assert tokenizer.detokenizer(prompt).add(word) == " Paris"
