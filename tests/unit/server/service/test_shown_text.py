"""Tests what an output shows of the tokens that a model says: special tokens, stop strings, and where a token's text begins."""

import codecs

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UnsupportedField
from engine.request import FinishReason, SamplingParams, TokenEvent, TokenLogprobs
from server.metrics.registry import Metrics
from server.service.output_builder import OutputBuilder
from server.service.service import GenerateService
from server.service.types import GenerationRequest
from server.text.jobs import finish
from server.text.stop import StopStrings
from tests.unit.server.service.calls import SETTINGS, TEXT, outputs_of, request
from tests.unit.server.text.tokenizers_for_tests import byte_level, gemma, llama2, llama2_by_words, no_decoder, word_piece

BEGIN, END, SYSTEM, USER, ASSISTANT = range(5)
FISH = TEXT.encode("🐟", add_special_tokens=False)  # four tokens, one for each byte


def ids_of(text):
    return TEXT.encode(text, add_special_tokens=False)


def chunks_of(tokens, *, text=TEXT, prompt=(), stop=(), size=1, stop_token=None, min_tokens=0, **fields):
    """Return the chunks of an output that has `tokens`, `size` of them in each event."""
    params = SamplingParams(max_tokens=1000, min_tokens=min_tokens, logprobs=0)
    request = GenerationRequest(request_id="r", prompt=list(prompt), params=params, stop=stop, text_offsets=True, **fields)
    builder = OutputBuilder(0, request, text, prompt, StopStrings(stop) if stop else None)
    chunks = []
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        event = TokenEvent("r", part, logprobs=[TokenLogprobs(t, -0.5, 1, [], []) for t in part])
        if start + size >= len(tokens):
            event.finish, event.stop_token = FinishReason.LENGTH if stop_token is None else FinishReason.STOP, stop_token
        chunks.append(builder.add(event))
        if builder.finish_reason is not None:
            break
    return chunks


def output_of(tokens, **how):
    """Return the text of an output, the ids and offsets of its tokens, and its last chunk."""
    chunks = chunks_of(tokens, **how)
    ids = [token for chunk in chunks for token in chunk.token_ids]
    assert [position.token for chunk in chunks for position in chunk.logprobs or ()] == ids
    offsets = [offset for chunk in chunks for offset in chunk.text_offsets]
    return "".join(chunk.text for chunk in chunks), ids, offsets, chunks[-1]


SAYS = [*ids_of("tide"), USER, *ids_of(" gate")]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<|user|>", "tide"),  # a special token alone
        ("de<|user|>", "ti"),  # ... after other text
        ("<|user|> g", "tide"),  # ... before other text
        ("e<|user|> ga", "tid"),  # ... in the middle
        ("<|us", "tide"),  # a part of it
        ("user", "tide"),
        ("e g", "tid"),  # two texts that the output shows side by side
    ],
)
@pytest.mark.parametrize("size", [1, 2, 100])
def test_a_stop_string_matches_what_the_model_says_and_what_the_output_shows(stop, text, size):
    shown, _, _, last = output_of(SAYS, stop=(stop,), size=size)
    assert (shown, last.finish_reason, last.stop_reason) == (text, "stop", stop)


@pytest.mark.parametrize(("stop", "text"), [("<|user|>", "tide<|user|>"), ("e<|user|> g", "tide<|user|> g"), ("e g", "tide g")])
def test_an_output_may_end_with_its_stop_string(stop, text):
    assert output_of(SAYS, stop=(stop,), include_stop_str_in_output=True)[0] == text


@pytest.mark.parametrize("make", [None, llama2, llama2_by_words, gemma])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_special_tokens_are_shown_if_the_request_asks_for_them(make, size):
    text = TEXT if make is None else make()
    special = 1 if make is None else 2
    tokens = [*text.encode("tide", add_special_tokens=False), special, *text.encode("gate", add_special_tokens=False), special]
    shown = output_of(tokens, text=text, size=size, skip_special_tokens=False)[0]
    assert shown == text._tokenizer.decode(tokens, skip_special_tokens=False)
    assert shown.count(text.token_text(special)) == 2
    assert text.token_text(special) not in output_of(tokens, text=text, size=size)[0]


def test_a_stop_string_is_found_in_special_tokens_that_are_shown():
    shown, _, _, last = output_of(SAYS, stop=("<|user|>",), skip_special_tokens=False)
    assert (shown, last.stop_reason) == ("tide", "<|user|>")


@pytest.mark.parametrize(("include", "text"), [(False, "tide"), (True, "tide<|end|>")])
def test_the_models_end_token_may_be_a_stop_string(include, text):
    tokens = [*ids_of("tide"), END]
    shown, _, _, last = output_of(tokens, stop=("<|end|>",), stop_token=END, include_stop_str_in_output=include)
    assert (shown, last.stop_reason) == (text, "<|end|>")


@pytest.mark.parametrize(
    ("include", "skip", "text"), [(True, False, "tide<|end|>"), (True, True, "tide"), (False, False, "tide")]
)
def test_an_output_has_the_token_that_ended_it_if_both_are_asked_for(include, skip, text):
    tokens = [*ids_of("tide"), END]
    how = {"include_stop_str_in_output": include, "skip_special_tokens": skip}
    assert output_of(tokens, stop_token=END, **how)[0] == text


def test_before_min_tokens_a_special_token_is_no_stop_string():
    assert output_of([USER, *ids_of("tide")], stop=("<|user|>",), min_tokens=3)[3].finish_reason == "length"


def test_a_tokens_text_begins_where_the_output_has_it():
    tokens = [*ids_of("a"), *FISH, USER, *ids_of("b")]
    text, ids, offsets, _ = output_of(tokens)
    assert (text, ids) == ("a🐟b", tokens)
    assert offsets == [0, 1, 1, 1, 1, 2, 2]
    assert output_of(tokens, skip_special_tokens=False)[2] == [0, 1, 1, 1, 1, 2, 2 + len("<|user|>")]


def fallback_bytes(values):
    text = llama2()
    return text, [next(i for i in range(text.vocab_size) if text.byte_of[i] == value) for value in values]


def plain_bytes(values):
    by_value = {TEXT.token_bytes(i): i for i in range(TEXT.vocab_size) if i > ASSISTANT}
    return TEXT, [by_value[bytes([value])] for value in values]


@pytest.mark.parametrize(
    ("values", "offsets", "fallback_offsets"),
    [
        (b"\xf0\xf0\xf0", [0, 1, 2], [0, 1, 2]),  # each begins a character that the next does not continue
        (b"\xf0\x9f\x41", [0, 0, 1], [0, 0, 2]),  # with byte fallback each wrong byte is a U+FFFD
        (b"\xf0\x9f\xf0\x9f\x90\x9f\x41", [0, 0, 1, 1, 1, 1, 2], [0, 0, 2, 2, 2, 2, 3]),
        (b"\xed\xa0\x41", [0, 0, 2], [0, 0, 2]),  # half of a surrogate pair, which is no character
        ("\N{REPLACEMENT CHARACTER}a".encode(), [0, 0, 0, 1], [0, 0, 0, 1]),  # the model says U+FFFD itself
    ],
)
def test_a_byte_that_does_not_continue_a_character_begins_after_it(values, offsets, fallback_offsets):
    for (text, ids), right in ((plain_bytes(values), offsets), (fallback_bytes(values), fallback_offsets)):
        for size in (1, 3):
            assert output_of(ids, text=text, size=size)[2] == right
        job = text.text_and_offsets(ids, skip_special_tokens=True)
        assert finish(job)[1] == right


def test_the_tokens_of_a_stop_string_begin_where_the_text_ends():
    tokens = [t for c in "xabcd" for t in ids_of(c)]
    chunks = chunks_of(tokens, stop=("abcd",))
    assert [chunk.text for chunk in chunks] == ["x", "", "", "", ""]
    assert [chunk.text_offsets for chunk in chunks] == [[0], [1], [], [], [1, 1, 1]]
    text, ids, offsets, last = output_of(tokens, stop=("abcd",))
    assert (text, ids, offsets, last.stop_reason) == ("x", tokens, [0, 1, 1, 1, 1], "abcd")


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 511), min_size=1, max_size=25),
    st.lists(st.sampled_from(["<|user|>", "e", "ab", "th", "<|", "s<|end|>"]), max_size=2),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
)
def test_a_token_begins_where_the_character_of_its_first_byte_does(tokens, stops, size, skip, include):
    how = {"stop": tuple(stops), "skip_special_tokens": skip, "include_stop_str_in_output": include}
    text, ids, offsets, last = output_of(tokens, size=size, **how)
    assert (text, ids, offsets) == output_of(tokens, size=1, **how)[:3]
    if last.stop_reason is None:
        assert ids == tokens
    decoder, length = codecs.getincrementaldecoder("utf-8")("replace"), 0
    for token, offset in zip(ids, offsets, strict=True):
        shown = b"" if skip and token <= ASSISTANT else TEXT.token_bytes(token)
        length += len(decoder.decode(shown[:1]))  # the first byte is inside the last of these characters, unless it waits
        assert offset == min(length - bool(shown and not decoder.getstate()[0]), len(text))
        length += len(decoder.decode(shown[1:]))


def test_the_prompts_ids_come_with_the_first_chunk_if_they_are_asked_for():
    first, *others = chunks_of(ids_of("tide gate"), prompt=[7, 8], return_token_ids=True)
    assert first.prompt_token_ids == [7, 8]
    assert others
    assert {chunk.prompt_token_ids for chunk in others} == {None}


def test_a_chunk_without_certain_tokens_has_no_log_probabilities():
    empty = [chunk for chunk in chunks_of([t for c in "xabcd" for t in ids_of(c)], stop=("abcd",)) if not chunk.token_ids]
    assert [msgspec.structs.asdict(chunk)["logprobs"] for chunk in empty] == [None, None]


@pytest.mark.parametrize(("make", "accepted"), [(word_piece, False), (no_decoder, False), (llama2, True), (byte_level, True)])
async def test_no_spaces_between_special_tokens_is_refused_where_the_tokenizer_writes_spaces(engine, make, accepted):
    service = GenerateService(engine, make(), SETTINGS, Metrics("tiny", lambda: engine.health))
    asked = request(max_tokens=2, seed=1)
    for skip in (True, False):
        fields = {"skip_special_tokens": skip, "spaces_between_special_tokens": False}
        sent = msgspec.structs.replace(asked, **fields)
        if accepted or skip:
            assert len((await outputs_of(service, sent))[0][0][0]) == 2
            continue
        with pytest.raises(UnsupportedField) as caught:
            await outputs_of(service, sent)
        assert caught.value.param == "spaces_between_special_tokens"
