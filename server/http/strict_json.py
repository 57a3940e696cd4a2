"""Parses JSON from untrusted clients, strictly by RFC 8259.

Many JSON parsers accept texts that RFC 8259 forbids. This parser refuses invalid UTF-8, a byte-order mark, NaN and Infinity,
numbers outside the range of a double, integers of thousands of digits, lone surrogates, an object with the same key twice, and
nesting that is too deep.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from engine.errors import MalformedRequest
from server.http.sliced_json import sliced

SLICED_BYTES = 64 << 10  # texts of at least this size are decoded in slices, so that other threads can run
# How the messages of the json module begin -> what the client is told.
_FAULTS = {
    "Expecting value": "there is no value",
    "Expecting property name": "there is no key in double quotes",
    "Expecting ':'": "there is no colon",
    "Expecting ','": "there is no comma",
    "Illegal trailing comma": "a comma is followed by nothing",
    "Extra data": "the value is followed by more text,",
    "Unterminated string": "the string has no end that begins",
    "Invalid control character": "a string has an unescaped control character",
    "Invalid \\": "a backslash begins no escape that JSON has",
    "Unexpected UTF-8 BOM": "it begins with a byte-order mark,",
}
MAX_KEYS = 1 << 16  # largest number of keys of one object. No field needs more than a thousand, and each costs time
# Each escape of a JSON text. The first group is half of a surrogate pair without its other half.
_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)


def loads(body: bytes) -> Any:
    """Parse the JSON text `body` and return its value. Raises MalformedRequest, whose message says what is wrong."""
    try:
        text = body.decode("utf-8")
        value = _decode(text) if len(body) < SLICED_BYTES else _decode_sliced(text)
        _check_surrogates(text)
    except UnicodeDecodeError as error:
        raise MalformedRequest(f"the body is not UTF-8: byte {error.start} is not valid") from None
    except RecursionError:
        raise MalformedRequest("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        what = next((ours for theirs, ours in _FAULTS.items() if error.msg.startswith(theirs)), "something is wrong")
        raise MalformedRequest(f"the body is not JSON: {what} at character {error.pos}") from None
    except ValueError:  # raised by int() for thousands of digits
        raise MalformedRequest("a number in the body has too many digits") from None
    return value


def _check_surrogates(text: str) -> None:
    """Refuse lone surrogates, which the json module accepts."""
    if "\\ud" not in text and "\\uD" not in text:
        return
    for escape in _ESCAPE.finditer(text):
        if escape[1] is not None:
            raise MalformedRequest(f"the body is not JSON: there is half a surrogate pair at character {escape.start()}")


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise MalformedRequest(f"an object in the body has more than {MAX_KEYS} keys")
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise MalformedRequest(f"the key {twice[:64]!r} appears twice in one object", param=twice[:64])
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise MalformedRequest("a number in the body is outside the range of a double")
    return value


def _constant(name: str) -> NoReturn:
    raise MalformedRequest(f"the body is not JSON: {name} is not a number in JSON")


def _decoder() -> json.JSONDecoder:
    return json.JSONDecoder(object_pairs_hook=_object, parse_float=_number, parse_constant=_constant)


_decode = _decoder().decode
_decode_sliced = sliced(_decoder()).decode
