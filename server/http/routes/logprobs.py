"""Writes log-probabilities as JSON, in the form of each route.

One answer may report millions of log-probabilities. So they are written one slice of positions at a time: each `write` here is a
generator that yields between two slices, and `server.service.pacing.Pacer` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from engine.request import TokenLogprobs
from server.http.json_parts import ItemsBuffer, Parts, object_parts
from server.service.pacing import Positions, slices
from server.service.types import Chunk

TokenText = Callable[[int], str]
TokenBytes = Callable[[int], bytes]
Item = Callable[[TokenLogprobs], dict[str, Any]]

_LOWEST = -9999.0  # JSON has no minus infinity; OpenAI sends this value for it


class LogprobsJson(Protocol):
    """The JSON text of one field that holds log-probabilities."""

    def write(self, positions: Positions) -> Iterator[None]:
        """Append `positions` to the JSON text. Yields between two slices of about SLICE log-probabilities."""

    def parts(self) -> Parts:
        """The JSON text of all positions written so far."""


Written = dict[str, LogprobsJson]  # field name -> its JSON
WriteLogprobs = Callable[[Chunk, Written], Iterator[None]]
"""A generator function that appends the log-probabilities of a Chunk to the fields of `Written`, and yields between two slices.
Fields that are missing are added."""


class ItemList:
    """Log-probabilities as a JSON list with one item for each position."""

    def __init__(self, item: Item) -> None:
        self._item = item
        self._items = ItemsBuffer()

    def write(self, positions: Positions) -> Iterator[None]:
        item = self._item
        for i, part in enumerate(slices(positions)):
            if i:
                yield
            self._items.add([None if position is None else item(position) for position in part])

    def parts(self) -> Parts:
        return self._items.parts()


class ChatLogprobsJson(ItemList):
    """Log-probabilities in the form of OpenAI's chat completions: an object with the list `content`."""

    def parts(self) -> Parts:
        return object_parts({"refusal": None}, {"content": self._items.parts()})


class CompletionLogprobsJson:
    """Log-probabilities in the form of OpenAI's completions: an object of four lists, each with one item for each position."""

    def __init__(self, num_top: int, text: TokenText, *, offset: int, first_token: int | None) -> None:
        """`num_top` is the number of alternatives at each position. `offset` is where in the choice's text the first position
        begins, in characters. `first_token` is the token of a position that is None."""
        self._num_top = num_top
        self._text = text
        self._offset = offset
        self._first_token = first_token or 0
        self._columns = {name: ItemsBuffer() for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}

    def write(self, positions: Positions) -> Iterator[None]:
        for i, part in enumerate(slices(positions)):
            if i:
                yield
            self._write_slice(part)

    def _write_slice(self, positions: Positions) -> None:
        tokens = [self._text(self._first_token if position is None else position.token) for position in positions]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        add = self._columns
        add["tokens"].add(tokens)
        add["token_logprobs"].add([None if p is None else _finite(p.logprob) for p in positions])
        add["text_offset"].add(offsets)
        if self._num_top:
            add["top_logprobs"].add([None if p is None else _top_map(p, self._num_top, self._text) for p in positions])

    def parts(self) -> Parts:
        written = {name: column.parts() for name, column in self._columns.items()}
        if not self._num_top:
            written["top_logprobs"] = [b"null"]
        return object_parts({}, written)


def write_each(output: Callable[[], LogprobsJson], prompt: Callable[[], LogprobsJson]) -> WriteLogprobs:
    """A function that appends a chunk's `logprobs` and `prompt_logprobs` to the fields of these names.

    `output` and `prompt` make the empty fields.
    """

    def write(chunk: Chunk, written: Written) -> Iterator[None]:
        for name, positions, new in (("logprobs", chunk.logprobs, output), ("prompt_logprobs", chunk.prompt_logprobs, prompt)):
            if positions is not None:
                yield from field_of(written, name, new).write(positions)

    return write


def field_of(written: Written, name: str, new: Callable[[], LogprobsJson]) -> LogprobsJson:
    """The field `name` of `written`. If it is missing, `new` makes it."""
    if name not in written:
        written[name] = new()
    return written[name]


def written_parts(written: Written, *names: str) -> dict[str, Parts]:
    """The JSON text of the fields in `written`, by name. With `names`, only of fields that have one of these names."""
    return {name: field.parts() for name, field in written.items() if not names or name in names}


def own_item(text: TokenText) -> Item:
    """A function that writes one position in the form of /v1/generate, which is `schemas.generate.TokenInfo`."""

    def item(position: TokenLogprobs) -> dict[str, Any]:
        top = zip(position.top_ids, position.top_logprobs, strict=True)
        return {
            "token_id": position.token,
            "text": text(position.token),
            "logprob": _finite(position.logprob),
            "rank": position.rank,
            "top": [{"token_id": token, "text": text(token), "logprob": _finite(logprob)} for token, logprob in top],
        }

    return item


def chat_item(text: TokenText, bytes_of: TokenBytes) -> Item:
    """A function that writes one position in the form of chat completions, which is `schemas.openai.ChatTokenLogprob`.

    From the field `bytes`, a client can put together a character whose bytes are in several tokens.
    """

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token": text(token), "logprob": _finite(logprob), "bytes": list(bytes_of(token))}

    def item(position: TokenLogprobs) -> dict[str, Any]:
        top = zip(position.top_ids, position.top_logprobs, strict=True)
        return {**one(position.token, position.logprob), "top_logprobs": [one(*pair) for pair in top]}

    return item


def prompt_item(text: TokenText) -> Item:
    """A function that writes one prompt position in the form of vLLM: token id -> {logprob, rank, decoded_token}."""

    def item(position: TokenLogprobs) -> dict[str, Any]:
        top = enumerate(zip(position.top_ids, position.top_logprobs, strict=True), 1)
        found = {str(t): {"logprob": _finite(lp), "rank": rank, "decoded_token": text(t)} for rank, (t, lp) in top}
        actual = {"logprob": _finite(position.logprob), "rank": position.rank, "decoded_token": text(position.token)}
        return {**found, str(position.token): actual}

    return item


def _top_map(position: TokenLogprobs, num_top: int, text: TokenText) -> dict[str, float]:
    """The alternatives and the token itself, as text -> log-probability. If two tokens have the same text, the more probable one
    is kept."""
    top = zip(position.top_ids[:num_top], position.top_logprobs[:num_top], strict=True)
    found: dict[str, float] = {}
    for token, logprob in top:
        found.setdefault(text(token), _finite(logprob))
    found.setdefault(text(position.token), _finite(position.logprob))
    return found


def _finite(logprob: float) -> float:
    """`logprob`, or -9999 if it is smaller or NaN."""
    return logprob if logprob > _LOWEST else _LOWEST
