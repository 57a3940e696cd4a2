"""Writes and sends JSON in parts: lists of byte strings (or of memory pages) that together are one JSON text.

Answers with log-probabilities can reach hundreds of megabytes. They are written and sent in parts, because a single call that
serialises or joins a whole answer would block the event loop until the call ends.
"""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

Parts = list[bytes | mmap.mmap]
PART_BYTES = 64 << 10  # least size of a full part; joining or sending this many bytes takes well under a millisecond


class ItemsBuffer:
    """Collects the items of one JSON list as JSON text. The caller adds a few items at a time."""

    __slots__ = ("_full", "_open")

    def __init__(self) -> None:
        self._full: Parts = []
        self._open = bytearray(b"[")

    def add(self, items: Sequence[Any]) -> None:
        if not items:
            return
        if self._full or len(self._open) > 1:
            self._open += b","
        self._open += memoryview(orjson.dumps(items))[1:-1]
        if len(self._open) >= PART_BYTES:
            self._full.append(_own_memory(self._open))
            self._open.clear()

    def parts(self) -> Parts:
        """Return the JSON text, in parts, of the list of all items that were added so far."""
        return [*self._full, bytes(self._open) + b"]"]


def _own_memory(data: bytearray) -> mmap.mmap:
    """Copy `data` to memory pages of its own, which return to the system as soon as the copy is freed.

    Otherwise malloc would return the memory of a large answer all at once, when the last part is freed. For 300 MB, that blocks
    the event loop for tens of milliseconds.
    """
    pages = mmap.mmap(-1, len(data), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages[:] = data
    return pages


def object_parts(fields: Mapping[str, Any], written: Mapping[str, Parts]) -> Parts:
    """Return a JSON object in parts. It has the plain values of `fields`, then the fields of `written`, whose values are already
    JSON text in parts."""
    parts: Parts = [orjson.dumps(fields)[:-1]]
    separator = b"," if fields else b""
    for name, value in written.items():
        parts += [b'%b"%b":' % (separator, name.encode()), *value]
        separator = b","
    return [*parts, b"}"]


def list_parts(items: Iterable[Parts]) -> Parts:
    """Return a JSON list in parts. Each item is already JSON text in parts."""
    parts: Parts = [b"["]
    for i, item in enumerate(items):
        parts += [b",", *item] if i else item
    return [*parts, b"]"]


def joined(parts: Parts) -> Iterator[bytes]:
    """Yield the bytes of `parts` in pieces of at least PART_BYTES. Only the last piece may be smaller.

    The parts are taken out of the list one by one, so that their memory is freed while the pieces are sent.
    """
    parts.reverse()
    open_ = bytearray()
    while parts:
        part = parts.pop()
        if len(open_) + len(part) >= PART_BYTES:
            yield bytes(open_) + part
            open_.clear()
        else:
            open_ += part
    if open_:
        yield bytes(open_)


class PartsResponse(Response):
    """An HTTP response that sends its JSON body piece by piece. Other tasks run between two pieces.

    `parts` must not be empty. The response empties the list.
    """

    media_type = "application/json"

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.status_code = 200
        self.background = None
        self.init_headers({"content-length": str(sum(map(len, parts)))})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        pieces = joined(self.parts)
        piece = next(pieces)
        for following in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)
            piece = following
        await send({"type": "http.response.body", "body": piece, "more_body": False})
