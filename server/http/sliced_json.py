"""Decodes JSON text like Python's json module, but lets other threads run at least every few milliseconds.

The C decoder of the json module holds the interpreter lock until it is done: a list of two million token ids stops the event loop
for a tenth of a second. Here Python code walks objects and lists, and the C decoder gets lists of whole numbers, which alone can
have millions of items, in pieces. It is slower than the C decoder for small texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from json.decoder import WHITESPACE, JSONArray  # type: ignore[attr-defined]  # Python's own parts, missing in the stubs
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from typing import Any

PIECE = 32 << 10  # characters of a list of numbers that are decoded in one go: about a millisecond
_NUMBERS = re.compile(r"[-0-9, \t\n\r]*")
ScanOnce = Callable[[str, int], tuple[Any, int]]


def sliced(decoder: json.JSONDecoder) -> json.JSONDecoder:
    """Make `decoder` decode in slices, with the same hooks and results. Returns `decoder`."""
    decoder.parse_array = _array  # type: ignore[attr-defined]  # missing in the stubs, as scan_once
    decoder.scan_once = py_make_scanner(decoder)  # type: ignore[attr-defined]
    return decoder


def _array(text_and_start: tuple[str, int], scan_once: ScanOnce) -> tuple[list[Any], int]:
    """Decode a list. `start` is the index behind the opening bracket. Returns the list and the index behind the closing one."""
    text, start = text_and_start
    values: list[Any] = []
    while True:
        end = _NUMBERS.match(text, start, start + PIECE).end()  # type: ignore[union-attr]  # it matches the empty text too
        if text[end : end + 1] == "]" and (end > start or not values):
            return values + _numbers(text, start, end, may_be_empty=not values), end + 1
        comma = text.rfind(",", start, end)
        if comma < 0:
            break
        values += _numbers(text, start, comma)
        start = comma + 1
    start = WHITESPACE.match(text, start).end()
    if values and text[start : start + 1] == "]":
        raise json.JSONDecodeError("Expecting value", text, start)
    rest, end = JSONArray((text, start), scan_once)
    return values + rest if values else rest, end


def _numbers(text: str, start: int, end: int, *, may_be_empty: bool = False) -> list[Any]:
    try:
        numbers: list[Any] = json.loads(f"[{text[start:end]}]")
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(error.msg, text, start + error.pos - 1) from None
    if not numbers and not may_be_empty:
        raise json.JSONDecodeError("Expecting value", text, start)
    return numbers
