"""Tests the strict JSON parser with texts that it must refuse, texts that it must accept, and generated texts."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import MalformedRequest
from server.http import strict_json

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


@pytest.mark.parametrize(("body", "says"), BAD.values(), ids=BAD.keys())
def test_a_faulty_text_is_refused_with_a_short_message(body, says):
    with pytest.raises(MalformedRequest) as caught:
        strict_json.loads(body)
    assert says in caught.value.message
    assert len(caught.value.message) < 200
    caught.value.message.encode()  # a message that cannot be encoded would turn the answer into a 500


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


@given(st.binary(max_size=64) | st.text(alphabet='{}[]",:0123456789eE+-.\\ud8ntfalsr ', max_size=64).map(str.encode))
def test_any_bytes_are_either_read_or_refused_as_malformed(body):
    with contextlib.suppress(MalformedRequest):
        strict_json.loads(body)


def test_large_texts_are_read_or_refused():
    """The texts are as large as a body may be by default. A parser that takes quadratic time would need hours for them."""
    assert len(strict_json.loads(b"[" + b"1," * 1_900_000 + b"1]")) == 1_900_001
    with pytest.raises(MalformedRequest):
        strict_json.loads(b'{"a": "' + b"\\ud800" * 600_000 + b'"}')
