"""JSON as the RFC has it, for bytes that come from strangers: what other parsers wave through is refused here.

Refused: broken UTF-8, a byte-order mark, NaN and Infinity, numbers past a double's range, integers of thousands of
digits, lone surrogates, a key given twice, nesting past the parser's depth. Each with one sentence, none with a traceback.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NoReturn

import orjson

from engine.errors import MalformedRequest


def loads(body: bytes) -> Any:
    """Parse `body`. Raises MalformedRequest."""
    try:
        text = body.decode("utf-8")
        value = _decode(text)
        if b"\\u" in body:
            orjson.loads(body)  # the standard parser lets a lone surrogate through
    except UnicodeDecodeError as error:
        raise MalformedRequest(f"the body is not UTF-8: byte {error.start} is wrong") from None
    except RecursionError:
        raise MalformedRequest("the body is nested too deeply") from None
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except json.JSONDecodeError as error:
        what = error.msg[:1].lower() + error.msg[1:]
        raise MalformedRequest(f"the body is not JSON: {what} at character {error.pos}") from None
    except ValueError:  # int() on more digits than Python will read
        raise MalformedRequest("a number in the body has too many digits") from None
    return value


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise MalformedRequest(f"the key {twice[:64]!r} stands twice in one object", param=twice[:64])
    return value


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise MalformedRequest("a number in the body is too large")
    return value


def _constant(name: str) -> NoReturn:
    raise MalformedRequest(f"{name} is not JSON")


_decode = json.JSONDecoder(object_pairs_hook=_object, parse_float=_number, parse_constant=_constant).decode
