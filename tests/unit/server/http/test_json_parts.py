"""Tests that JSON written in parts equals JSON written at once."""

import json

from hypothesis import given
from hypothesis import strategies as st

from server.http.json_parts import PART_BYTES, ItemsBuffer, joined, list_parts, object_parts

names = st.text("abcxyz", min_size=1, max_size=4)
values = st.none() | st.integers(-9, 9) | st.text(max_size=5) | st.lists(st.integers(0, 9), max_size=3)


def parsed(parts):
    return json.loads(b"".join(parts))


def written(value):
    """Return the JSON text of `value` in parts of three bytes."""
    text = json.dumps(value).encode()
    return [text[i : i + 3] for i in range(0, len(text), 3)]


@given(st.lists(st.lists(values, max_size=5), max_size=5))
def test_items_that_are_added_in_groups_are_one_list(groups):
    buffer = ItemsBuffer()
    for group in groups:
        buffer.add(group)
    assert parsed(buffer.parts()) == [item for group in groups for item in group]


def test_a_long_list_is_kept_in_several_parts():
    buffer = ItemsBuffer()
    for _ in range(100):
        buffer.add(["x" * 5000])
    assert max(map(len, buffer.parts())) < 2 * PART_BYTES
    assert parsed(buffer.parts()) == ["x" * 5000] * 100
    buffer.add([1])
    assert parsed(buffer.parts())[-1] == 1


@given(st.dictionaries(names, values, max_size=4), st.dictionaries(names, values, max_size=4))
def test_an_object_has_its_plain_and_its_written_fields(plain, other):
    other = {name: value for name, value in other.items() if name not in plain}
    assert parsed(object_parts(plain, {name: written(value) for name, value in other.items()})) == plain | other


@given(st.lists(values, max_size=5))
def test_a_list_has_its_written_items(items):
    assert parsed(list_parts(map(written, items))) == items


@given(st.lists(st.integers(0, 3 * PART_BYTES), max_size=12))
def test_joined_pieces_are_the_same_bytes_and_large_enough(sizes):
    parts = [bytes([i]) * size for i, size in enumerate(sizes)]
    whole = b"".join(parts)
    pieces = list(joined(parts))
    assert b"".join(pieces) == whole
    assert all(len(piece) >= PART_BYTES for piece in pieces[:-1])
    assert parts == []  # `joined` must take out the parts, so that their memory is freed while pieces are sent
