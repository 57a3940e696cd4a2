"""Parses JSON from untrusted clients, strictly by RFC 8259.

Many JSON parsers accept texts that RFC 8259 forbids. This parser refuses invalid UTF-8, a byte-order mark, NaN and Infinity,
numbers outside the range of a double, integers of thousands of digits, lone surrogates, an object with the same key twice, and
nesting that is too deep.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NoReturn

import orjson

from engine.errors import MalformedRequest


def loads(body: bytes) -> Any:
    """Parse the JSON text `body` and return its value. Raises MalformedRequest, whose message says what is wrong."""
    try:
        text = body.decode("utf-8")
        value = _decode(text)
        if b"\\u" in body:
            orjson.loads(body)  # refuses lone surrogates, which the standard parser accepts
    except UnicodeDecodeError as error:
        raise MalformedRequest(f"the body is not UTF-8: byte {error.start} is not valid") from None
    except RecursionError:
        raise MalformedRequest("the body is nested too deeply") from None
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except json.JSONDecodeError as error:
        what = error.msg[:1].lower() + error.msg[1:]
        raise MalformedRequest(f"the body is not JSON: {what} at character {error.pos}") from None
    except ValueError:  # raised by int() for thousands of digits
        raise MalformedRequest("a number in the body has too many digits") from None
    return value


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
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


_decode = json.JSONDecoder(object_pairs_hook=_object, parse_float=_number, parse_constant=_constant).decode
