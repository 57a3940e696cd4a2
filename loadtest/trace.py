"""Reads traces and files of lengths: one JSON object a line. A torn line is named by file, line number and key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from engine.slo import SloName
from loadtest.spec import LoadError, TraceRow

_Tokens = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


class _Row(msgspec.Struct, forbid_unknown_fields=True):
    at: Annotated[float, msgspec.Meta(ge=0)]
    prompt_tokens: _Tokens
    output_tokens: _Tokens
    slo_class: SloName | None = None


class _Pair(msgspec.Struct, forbid_unknown_fields=True):
    prompt_tokens: _Tokens
    output_tokens: _Tokens


_T = TypeVar("_T", _Row, _Pair)


def read_trace(path: Path, *, speed: float = 1.0) -> tuple[TraceRow, ...]:
    """Return the requests of a trace in order of time. `speed` 2 sends them twice as fast. Raises LoadError."""
    rows = [TraceRow(r.at / speed, r.prompt_tokens, r.output_tokens, r.slo_class) for r in _read(path, _Row)]
    return tuple(sorted(rows, key=lambda row: row.at))


def read_lengths(path: Path) -> tuple[tuple[int, int], ...]:
    """Return the pairs (prompt tokens, output tokens) of a file. Raises LoadError."""
    return tuple((pair.prompt_tokens, pair.output_tokens) for pair in _read(path, _Pair))


def _read(path: Path, kind: type[_T]) -> Iterator[_T]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror}") from None
    decoder = msgspec.json.Decoder(kind)
    found = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield decoder.decode(line)
        except msgspec.DecodeError as error:
            keys = ", ".join(kind.__struct_fields__)
            raise LoadError(f"{path} line {number}: {_plain(error)}; a line is a JSON object with {keys}") from None
        found += 1
    if not found:
        raise LoadError(f"{path} has no line: it needs one JSON object a line")


def _plain(error: msgspec.DecodeError) -> str:
    """Return msgspec's text, with a key's path written as its name."""
    text, _, path = str(error).partition(" - at `$.")
    return f"{path.rstrip('`')}: {text}" if path else text
