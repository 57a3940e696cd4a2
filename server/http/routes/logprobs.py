"""Writes log-probabilities as JSON, in the form of each route.

One answer may report millions of log-probabilities. So they are written one slice of positions at a time: each `write` here is a
generator that yields between two slices, and `server.service.pacing.Pacer` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar, cast

from engine.request import TokenLogprobs
from server.http.json_parts import ItemsBuffer, Parts, object_parts
from server.service.pacing import Positions, slices
from server.service.types import Chunk

TokenText = Callable[[int], str]
TokenBytes = Callable[[int], bytes]
Item = Callable[[TokenLogprobs], dict[str, Any]]

_LOWEST = -9999.0  # written for minus infinity, which JSON does not have; OpenAI uses the same value


class LogprobsJson(Protocol):
    """Collects the JSON text of one field of an answer, which holds log-probabilities."""

    def write(self, positions: Positions) -> Iterator[None]:
        """Append `positions` to the JSON text. Yields between two slices of about SLICE log-probabilities."""

    def parts(self) -> Parts:
        """Return the JSON text, in parts, of all positions written so far."""


Field = TypeVar("Field", bound=LogprobsJson)
Written = dict[str, LogprobsJson]  # name of an answer's field -> the field's JSON text
WriteLogprobs = Callable[[Chunk, Written], Iterator[None]]
"""A generator function that appends the log-probabilities of a Chunk to the fields of `Written`, and yields between two slices.
Fields that are missing are added."""


class ItemList:
    """Writes log-probabilities as a JSON list with one item for each position."""

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
    """Writes log-probabilities in the form of OpenAI's chat completions: an object with the list `content`."""

    def parts(self) -> Parts:
        return object_parts({"refusal": None}, {"content": self._items.parts()})


class CompletionLogprobsJson:
    """Writes log-probabilities in the form of OpenAI's completions: an object of four lists with one item for each position."""

    def __init__(self, num_top: int, text: TokenText, *, first_token: int | None) -> None:
        """`num_top` is the number of alternatives at each position. `first_token` is the token at a position that is None, which
        is the first position of a prompt."""
        self._num_top = num_top
        self._text = text
        self._first_token = first_token or 0
        self._columns = {name: ItemsBuffer() for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}

    def write(self, positions: Positions) -> Iterator[None]:
        for i, part in enumerate(slices(positions)):
            if i:
                yield
            self._write_slice(part)

    def _write_slice(self, positions: Positions) -> None:
        add = self._columns
        add["tokens"].add([self._text(self._first_token if position is None else position.token) for position in positions])
        add["token_logprobs"].add([None if p is None else _finite(p.logprob) for p in positions])
        add["top_logprobs"].add([None if p is None else _top_map(p, self._num_top, self._text) for p in positions])

    def add_offsets(self, offsets: list[int]) -> None:
        """Append where the text of each position begins in the choice's text, in characters. `write` takes the same positions."""
        self._columns["text_offset"].add(offsets)

    def parts(self) -> Parts:
        return object_parts({}, {name: column.parts() for name, column in self._columns.items()})


def write_each(output: Callable[[], LogprobsJson], prompt: Callable[[], LogprobsJson]) -> WriteLogprobs:
    """Return a function that appends a chunk's log-probabilities to the answer's fields `logprobs` and `prompt_logprobs`.

    `output` makes an empty field `logprobs`, and `prompt` makes an empty field `prompt_logprobs`.
    """

    def write(chunk: Chunk, written: Written) -> Iterator[None]:
        for name, positions, new in (("logprobs", chunk.logprobs, output), ("prompt_logprobs", chunk.prompt_logprobs, prompt)):
            if positions is not None:
                yield from field_of(written, name, new).write(positions)

    return write


def field_of(written: Written, name: str, new: Callable[[], Field]) -> Field:
    """Return the field `name` of `written`. If the field is missing, `new` makes it and it is added."""
    if name not in written:
        written[name] = new()
    return cast(Field, written[name])


def written_parts(written: Written, *names: str) -> dict[str, Parts]:
    """Return the JSON text of each field in `written`, by field name. If `names` are given, other fields are left out."""
    return {name: field.parts() for name, field in written.items() if not names or name in names}


def own_item(text: TokenText) -> Item:
    """Return a function that formats one position in the form of /v1/generate, which is `schemas.generate.TokenInfo`."""

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
    """Return a function that formats one position as chat completions do, which is `schemas.openai.ChatTokenLogprob`.

    From the field `bytes`, a client can put together a character whose bytes are in several tokens.
    """

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token": text(token), "logprob": _finite(logprob), "bytes": list(bytes_of(token))}

    def item(position: TokenLogprobs) -> dict[str, Any]:
        top = zip(position.top_ids, position.top_logprobs, strict=True)
        return {**one(position.token, position.logprob), "top_logprobs": [one(*pair) for pair in top]}

    return item


def prompt_item(text: TokenText) -> Item:
    """Return a function that formats one prompt position in the form of vLLM: token id -> {logprob, rank, decoded_token}."""

    def item(position: TokenLogprobs) -> dict[str, Any]:
        top = enumerate(zip(position.top_ids, position.top_logprobs, strict=True), 1)
        found = {str(t): {"logprob": _finite(lp), "rank": rank, "decoded_token": text(t)} for rank, (t, lp) in top}
        actual = {"logprob": _finite(position.logprob), "rank": position.rank, "decoded_token": text(position.token)}
        return {**found, str(position.token): actual}

    return item


def _top_map(position: TokenLogprobs, num_top: int, text: TokenText) -> dict[str, float]:
    """Map the text of the `num_top` most probable tokens, and of the position's own token, to their log-probabilities. If two
    tokens have the same text, the more probable one is kept."""
    top = zip(position.top_ids[:num_top], position.top_logprobs[:num_top], strict=True)
    found: dict[str, float] = {}
    for token, logprob in top:
        found.setdefault(text(token), _finite(logprob))
    found.setdefault(text(position.token), _finite(position.logprob))
    return found


def _finite(logprob: float) -> float:
    """Return `logprob`, or -9999 if `logprob` is smaller than that or NaN."""
    return logprob if logprob > _LOWEST else _LOWEST
