"""Tests the strict JSON parser with texts that it must refuse, texts that it must accept, and generated texts."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import MalformedRequest
from server.http import sliced_json, strict_json

BAD = {
    "not JSON": (b"{'a': 1}", "not JSON"),
    "truncated": (b'{"a": ', "not JSON"),
    "two values": (b'{"a": 1} {"b": 2}', "not JSON"),
    "trailing comma": (b'{"a": 1,}', "not JSON"),
    "broken UTF-8": (b'{"a": "\xff"}', "not UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "byte-order mark": (b'\xef\xbb\xbf{"a": 1}', "not JSON"),
    "surrogate in UTF-8": (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
    "lone surrogate": (b'{"a": "\\ud800"}', "surrogate"),
    "lone surrogate, upper case": (b'{"a": "\\uDC00"}', "not JSON"),
    "two high surrogates": (b'{"a": "\\ud83c\\ud83c\\udf0a"}', "surrogate"),
    "a low surrogate behind a pair": (b'{"a": "\\ud83c\\udf0a\\udf0a"}', "surrogate"),
    "a surrogate behind a backslash": (b'{"a": "\\\\\\ud800"}', "surrogate"),
    "lone surrogate as a key": (b'{"\\ud800": 1}', "surrogate"),
    "raw control character": (b'{"a": "\x00"}', "not JSON"),
    "NaN": (b'{"a": NaN}', "NaN is not a number"),
    "Infinity": (b'{"a": -Infinity}', "-Infinity is not a number"),
    "1e999": (b'{"a": 1e999}', "outside the range"),
    "-1e999": (b'{"a": -1e999}', "outside the range"),
    "5000 digits": (b'{"a": ' + b"1" * 5000 + b"}", "too many digits"),
    "the same key twice": (b'{"a": 1, "a": 2}', "'a' appears twice"),
    "the same key twice, in a nested object": (b'{"b": [{"a": 1, "c": 2, "a": 1}]}', "'a' appears twice"),
    "the same key twice, once escaped": (b'{"a": 1, "\\u0061": 2}', "'a' appears twice"),
    "depth 200,000, arrays": (b"[" * 200_000, "nested too deeply"),
    "depth 200,000, objects": (b'{"a":' * 200_000, "nested too deeply"),
    "depth 200,000, closed": (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
}


LARGE = b" " * strict_json.SLICED_BYTES  # behind this much white space a text is decoded in slices


@pytest.mark.parametrize("before", [b"", LARGE], ids=["at once", "in slices"])
@pytest.mark.parametrize(("body", "says"), BAD.values(), ids=BAD.keys())
def test_a_faulty_text_is_refused_with_a_short_message(body, says, before):
    body = before + body if not body.startswith(b"\xef") else body + before
    with pytest.raises(MalformedRequest) as caught:
        strict_json.loads(body)
    assert says in caught.value.message
    assert len(caught.value.message) < 200
    caught.value.message.encode()  # a message that cannot be encoded would turn the answer into a 500


@pytest.mark.parametrize("before", [b"", LARGE], ids=["at once", "in slices"])
@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"a": }', "there is no value at character 6"),
        (b"{'a': 1}", "there is no key in double quotes at character 1"),
        (b'{"a" 1}', "there is no colon at character 5"),
        (b'{"a": 1 "b": 2}', "there is no comma at character 8"),
        (b'{"a": [1 2]}', "there is no comma at character 9"),
        (b'{"a": 1} x', "the value is followed by more text, at character 9"),
        (b'{"a": "x', "the string has no end that begins at character 6"),
        (b'{"a": "\n"}', "a string has an unescaped control character at character 7"),
        (b'{"a": "\\x"}', "a backslash begins no escape that JSON has at character 7"),
        (b'{"a": "\\u12"}', "a backslash begins no escape that JSON has at character "),
    ],
)
def test_a_fault_is_described_in_our_words_with_its_place(body, says, before):
    if before:
        says = says.rpartition(" ")[0]  # the white space moves the place
    with pytest.raises(MalformedRequest, match=says):
        strict_json.loads(before + body)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=20,
    )
)
def test_every_JSON_value_is_read_as_it_was_written(value):
    try:
        body = json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return  # the value has a lone surrogate, which UTF-8 cannot encode
    assert strict_json.loads(body) == value
    assert strict_json.loads(json.dumps(value).encode()) == value
    assert strict_json.loads(LARGE + body) == value
    assert strict_json.loads(LARGE + json.dumps(value, indent=1).encode()) == value


@given(st.binary(max_size=64) | st.text(alphabet='{}[]",:0123456789eE+-.\\ud8ntfalsr ', max_size=64).map(str.encode))
def test_any_bytes_are_either_read_or_refused_as_malformed(body):
    with contextlib.suppress(MalformedRequest):
        strict_json.loads(body)


lists = st.recursive(
    st.text(alphabet="0123456789-, \n", max_size=12)
    | st.sampled_from(['"a"', "1.5", "1e3", "true", "{}", "[", "]", "01", "--1"]),
    lambda inner: st.lists(inner, max_size=4).map(lambda parts: "[" + ",".join(parts) + "]"),
    max_leaves=12,
)


@given(lists)
def test_lists_of_numbers_are_read_or_refused_alike_in_slices_and_at_once(text):
    results = []
    for before in (b"", LARGE):
        try:
            results.append(json.dumps(strict_json.loads(before + text.encode())))
        except MalformedRequest as error:
            results.append(error.message.rpartition(" at character ")[0] or error.message)
    at_once, in_slices = results
    assert (at_once == in_slices) or ("not JSON" in at_once and "not JSON" in in_slices)


@pytest.mark.parametrize("piece", [1, 2, 7, 16])
def test_lists_are_the_same_whatever_the_size_of_a_slice(monkeypatch, piece):
    monkeypatch.setattr(sliced_json, "PIECE", piece)
    value = [[], [1], [1, -22, 333], [4, [5, 6, [7]], "a", 8, 9.5, {"b": [10, 11]}], list(range(1000)), [None, 1, 2]]
    for separators in ((",", ":"), (", ", ": "), (" ,\n ", " : ")):
        body = LARGE + json.dumps(value, separators=separators).encode()
        assert strict_json.loads(body) == value
    for bad in (b"[1,2,]", b"[1,,2]", b"[,1]", b"[1 2]", b"[1,2", b"[1,-]", b"[01]", b"[1,2}", b"[1,\n]", b"[ , ]"):
        with pytest.raises(MalformedRequest, match="not JSON"):
            strict_json.loads(LARGE + bad)


def test_an_object_with_more_keys_than_any_field_needs_is_refused():
    with pytest.raises(MalformedRequest, match="more than 65536 keys"):
        strict_json.loads(json.dumps({str(i): 1 for i in range(70_000)}).encode())


@pytest.mark.parametrize("text", ["\\ud800", "\\\\ud800", "\\n\\\\uDC00 \\u"])
def test_a_backslash_that_is_text_itself_begins_no_escape(text):
    assert strict_json.loads(json.dumps({"a": text}).encode()) == {"a": text}


def test_large_texts_are_read_or_refused():
    """The texts are as large as a body may be by default. A parser that takes quadratic time would need hours for them."""
    assert len(strict_json.loads(b"[" + b"1," * 1_900_000 + b"1]")) == 1_900_001
    with pytest.raises(MalformedRequest):
        strict_json.loads(b'{"a": "' + b"\\ud800" * 600_000 + b'"}')
