import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders

from server.text.detokenizer import WindowDetokenizer
from tests.unit.server.text.tokenizers_for_tests import (
    ALL,
    LLAMA2_DECODER,
    byte_level,
    gemma,
    llama2,
    llama2_by_words,
    metaspace,
    sentencepiece,
)

CASES = pytest.mark.parametrize("make", ALL.values(), ids=ALL)
SENTENCEPIECE = [llama2, llama2_by_words, gemma, metaspace]
IDS = st.lists(st.integers(0, 760), max_size=40)  # no tokenizer of these tests knows the largest ids
CUTS = st.lists(st.integers(1, 5), min_size=40, max_size=40)
EMOJI = "a🌊b 日本語 é"
REPLACEMENT = "\ufffd"


def library_text(tokenizer, ids):
    """Decode `ids` with the library, after replacing each undecodable byte token by the token of U+FFFD.

    Otherwise the library would replace all bytes of a run that has a wrong byte, and so the complete characters in it too.
    """
    replacement = tokenizer._tokenizer.token_to_id(REPLACEMENT)
    visible = [id for id in ids if not tokenizer.is_silent[id]]
    decodable = []
    for is_byte, group in itertools.groupby(visible, key=lambda id: tokenizer.byte_of[id] is not None):
        run = list(group)
        if is_byte:
            text = bytes(tokenizer.byte_of[id] for id in run).decode("utf-8", "surrogateescape")
            wrong = [0xDC80 <= ord(c) <= 0xDCFF for c in text for _ in range(len(c.encode("utf-8", "surrogateescape")))]
            run = [replacement if bad else id for id, bad in zip(run, wrong, strict=True)]
        decodable += run
    return tokenizer._tokenizer.decode(decodable, skip_special_tokens=True)


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


@pytest.mark.parametrize("make", [byte_level, *SENTENCEPIECE])
@settings(deadline=None)
@given(st.lists(st.integers(0, 255), max_size=30), st.lists(st.integers(0, 760), max_size=4), CUTS)
def test_random_bytes_between_other_tokens(make, values, others, cuts):
    """Most sequences of random bytes are not valid UTF-8."""
    tokenizer = make()
    ids = others + [byte_token(tokenizer, value) for value in values] + others
    assert "".join(pieces_of(tokenizer.detokenizer(), ids, cuts)) == library_text(tokenizer, ids)


def byte_token(tokenizer, value):
    fallback = tokenizer._tokenizer.token_to_id(f"<0x{value:02X}>")
    if fallback is not None:
        return fallback
    return next(id for id in range(tokenizer.vocab_size) if tokenizer.token_bytes(id) == bytes([value]))


@CASES
@settings(max_examples=100, deadline=None)
@given(IDS, IDS, CUTS)
def test_after_a_prompt_the_text_is_what_the_tokens_add_to_it(make, prompt, ids, cuts):
    tokenizer = make()
    prompt = tokenizer.encode("The tide. ") + prompt + tokenizer.encode("gate")
    whole = library_text(tokenizer, prompt + ids)
    text = "".join(pieces_of(tokenizer.detokenizer(prompt), ids, cuts))
    assert whole == library_text(tokenizer, prompt) + text


@pytest.mark.parametrize("make", [byte_level, *SENTENCEPIECE])
def test_no_piece_ends_inside_a_character(make):
    tokenizer = make()
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.add([id]) for id in tokenizer.encode(EMOJI, add_special_tokens=False)]
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == EMOJI


@pytest.mark.parametrize(("make", "text"), [(byte_level, REPLACEMENT), (llama2, 2 * REPLACEMENT)])
def test_half_a_character_at_the_end_comes_with_the_flush(make, text):
    tokenizer = make()
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.add([byte_token(tokenizer, 0xF0), byte_token(tokenizer, 0x9F)]) == ""
    assert detokenizer.flush() == text


@pytest.mark.parametrize("prompt", ["The capital of France is", "Two waves: 🌊🌊", "é"])
def test_the_space_before_the_first_word_is_kept_after_a_prompt(prompt):
    tokenizer = llama2()
    word = tokenizer.encode("Paris")
    assert tokenizer.detokenizer().add(word) == "Paris"
    assert tokenizer.detokenizer(tokenizer.encode(prompt)).add(word) == " Paris"


@pytest.mark.parametrize("make", [byte_level, *SENTENCEPIECE])
@pytest.mark.parametrize("prompt", [b"\xf0", b"\xf0\x9f", b"\xf0\x9f\x8c", b"\xe2\x82"])
@pytest.mark.parametrize(
    ("output", "text"),
    [([], ""), (["y"], "y"), ([b"\xff", "y"], "\ufffdy"), ([b"\xf0\x9f\x8c\x8a"], "🌊"), (["y", b"\xf0"], "y" + REPLACEMENT)],
    ids=str,
)
def test_the_incomplete_character_of_a_prompt_adds_nothing_to_an_output_that_does_not_complete_it(make, prompt, output, text):
    tokenizer = make()
    detokenizer = after_bytes(tokenizer, prompt)
    pieces = [detokenizer.add([token]) for token in ids_of_units(tokenizer, output)]
    assert "".join(pieces) + detokenizer.flush() == text


@pytest.mark.parametrize("make", SENTENCEPIECE)
@pytest.mark.parametrize(
    ("prompt", "output", "text"),
    [
        (b"\xf0\x9f\x8c", [b"\x8a", "y"], "🌊y"),
        (b"\xf0", [b"\x9f\x8c\x8a"], "🌊"),
        (b"\xe2", [b"\x82\xac\xf0"], "€" + REPLACEMENT),
        (b"\xf0\x9f", [b"\x8c", "y"], REPLACEMENT + "y"),  # the byte of the output, without the two of the prompt
        (b"\xf0\x9f", [b"\x8c"], REPLACEMENT),
    ],
)
def test_an_output_may_continue_the_incomplete_character_of_a_prompt(make, prompt, output, text):
    tokenizer = make()
    detokenizer = after_bytes(tokenizer, prompt)
    assert detokenizer.add(ids_of_units(tokenizer, output)) + detokenizer.flush() == text


def after_bytes(tokenizer, values):
    """A detokenizer after a prompt that ends with the bytes `values`."""
    return tokenizer.detokenizer(tokenizer.encode("gate") + [byte_token(tokenizer, value) for value in values])


def ids_of_units(tokenizer, units):
    """The token of each text of one letter, and the byte tokens of each bytes object."""
    ids = []
    for unit in units:
        ids += [tokenizer._tokenizer.token_to_id(unit)] if isinstance(unit, str) else [byte_token(tokenizer, b) for b in unit]
    return ids


# -- how much is held back, and how much is decoded ----------------------------------------------------------------------

BYTE_LEVEL_UNITS = [b"\xef\xbf\xbd", b"\xff", b"\xf0\x9f", b"\xf0\x9f\x8c\x8a", b"\x80", b"a"]
STREAMS = st.lists(st.sampled_from(["replacement", "space", "word", *BYTE_LEVEL_UNITS]), min_size=1, max_size=40)


def stream_of(tokenizer, units):
    """Return the token ids of `units`: U+FFFD tokens, spaces, words, and bytes that are written as byte tokens."""
    ids = {name: tokenizer._tokenizer.token_to_id(text) for name, text in (("replacement", REPLACEMENT), ("space", "▁"))}
    ids["word"] = tokenizer._tokenizer.token_to_id("the") or tokenizer.encode("the", add_special_tokens=False)[-1]
    tokens = []
    for unit in units:
        if isinstance(unit, bytes):
            tokens += [byte_token(tokenizer, value) for value in unit]
        elif ids[unit] is not None:
            tokens.append(ids[unit])
    return tokens


@pytest.mark.parametrize("make", [byte_level, *SENTENCEPIECE])
@settings(deadline=None)
@given(STREAMS)
@example(["replacement"] * 40)
@example([b"\xff"] * 40)
@example([b"\xf0\x9f\x8c\x8a"] * 10)
def test_at_most_three_tokens_are_held_back_and_only_incomplete_characters(make, units):
    tokenizer = make()
    detokenizer, sent = tokenizer.detokenizer(), ""
    tokens = stream_of(tokenizer, units)
    for i, token in enumerate(tokens):
        sent += detokenizer.add([token])
        rest = library_text(tokenizer, tokens[: i + 1])[len(sent) :]
        held = next((n for n in range(1, 4) if is_incomplete(tokenizer, tokens[: i + 1], n)), 0)
        assert len(rest) <= held
        assert rest == REPLACEMENT * len(rest)


def is_incomplete(tokenizer, tokens, num):
    """Return whether the last `num` tokens are bytes that further bytes could complete to one character."""
    last = [tokenizer.token_bytes(token) for token in tokens[-num:]]
    if any(len(piece) != 1 for piece in last):
        return False
    return any(
        len(whole) == 1
        for tail in (b"\x80", b"\xa0\x80", b"\x80\x80", b"\x90\x80\x80", b"\x80\x80\x80", b"\xbf\xbf\xbf")
        if len(whole := (b"".join(last) + tail).decode("utf-8", "ignore")) == 1 and whole.encode() == b"".join(last) + tail
    )


class CountingTexts:
    """Wraps a tokenizer, and counts the calls of the library's decoder and the tokens that it decodes."""

    def __init__(self, tokenizer):
        self.is_silent, self.byte_of, self.anchor = tokenizer.is_silent, tokenizer.byte_of, tokenizer.anchor
        self._decode = tokenizer.decode_tokens
        self.calls = self.num_tokens = 0

    def decode_tokens(self, ids):
        self.calls += 1
        self.num_tokens += len(ids)
        return self._decode(ids)


@pytest.mark.parametrize("make", SENTENCEPIECE)
@pytest.mark.parametrize(
    "units",
    [["replacement"], ["space"], ["word"], [b"\xff"], [b"\xf0\x9f"], [b"\xf0\x9f\x8c\x8a"], [b"a"], ["word", b"\x80", "space"]],
    ids=str,
)
def test_the_work_for_a_token_does_not_grow_with_the_stream(make, units):
    texts = CountingTexts(make())
    tokens = stream_of(make(), units * 3000)
    detokenizer = WindowDetokenizer(texts)
    for token in tokens:
        detokenizer.add([token])
    assert texts.calls <= 4 * len(tokens)
    assert texts.num_tokens <= 13 * len(tokens)  # 4-byte characters: 8 tokens with the context, 4 alone


def test_many_tokens_at_once_are_few_calls():
    texts = CountingTexts(llama2())
    tokens = llama2().encode("The tide gate 🌊 lets the water through. " * 100)
    assert WindowDetokenizer(texts).add(tokens) == llama2().decode(tokens)
    assert texts.calls <= 3
    assert texts.num_tokens <= len(tokens) + 10


# The following tests decode token ids in pieces.


@CASES
@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 760), max_size=200), st.integers(1, 7))
def test_decoding_in_steps_gives_the_text_of_all_tokens(make, ids, piece_tokens):
    tokenizer = make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.text.tokenizer.PIECE_TOKENS", piece_tokens)
        job = tokenizer.decoding(ids)
    steps = 0
    while not job.done:
        assert job.step(piece_tokens)
        steps += 1
    assert steps == max(1, -(-len(ids) // piece_tokens))
    assert job.result() == library_text(tokenizer, ids)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.Sequence([LLAMA2_DECODER, decoders.Replace(Regex(" +"), " ")]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.Fuse(), decoders.Metaspace()]),
    ],
    ids=["CTC", "pattern", "strips the end", "fuses first"],
)
def test_a_decoder_that_looks_further_decodes_all_tokens_in_one_step(decoder):
    tokenizer = sentencepiece(decoder)
    ids = list(range(300, 700)) * 5
    job = tokenizer.decoding(ids)
    assert not job.step(len(ids) - 1)
    assert job.step()
    assert job.done
    assert job.result() == library_text(tokenizer, ids)
