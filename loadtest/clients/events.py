"""Reads the events of the three streaming routes over HTTP.

An event counts if it brought a part of the answer. The first chunk of a chat, which only names the role, does not: it would make
the time to first token the time to the headers. Neither does a last chunk that only has the reason of the end or the usage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from loadtest.record import Failure, Reading

Reader = Callable[[dict[str, Any], float, Reading], None]


class EventReader:
    """Takes the body of a stream in pieces as they arrive, and gives each event to a reader. Raises Failure for a bad event."""

    def __init__(self, read: Reader, reading: Reading) -> None:
        self._read, self._reading = read, reading
        self._rest = b""
        self.done = False  # [DONE] has come: the answer is complete

    def feed(self, piece: bytes, now: float) -> None:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            payload = line[5:].strip()
            if payload == b"[DONE]":
                self.done = True
            else:
                self._read(parse(payload), now, self._reading)


def parse(payload: bytes) -> dict[str, Any]:
    """Return the object of one event. Raises Failure if it is none, or if the server reports an error in it."""
    try:
        event = orjson.loads(payload)
    except orjson.JSONDecodeError:
        raise Failure("not JSON", f"an event is {payload[:80]!r}") from None
    if not isinstance(event, dict):
        raise Failure("not an object", f"an event is {payload[:80]!r}")
    if event.get("error"):
        raise Failure(*_error(event["error"]))
    return event


def _error(error: object) -> tuple[str, str]:
    if not isinstance(error, dict):
        return "error in stream", str(error)
    return f"error in stream: {error.get('code') or error.get('type')}", str(error.get("message", ""))


def read_generate(event: dict[str, Any], now: float, reading: Reading) -> None:
    ids = event.get("token_ids")
    if ids:
        reading.event(now, len(ids))
        if reading.keep:
            reading.answer_ids += ids
    usage = event.get("usage")
    if usage:
        reading.usage(usage["prompt_tokens"], usage["completion_tokens"], usage["cached_tokens"])


def read_completions(event: dict[str, Any], now: float, reading: Reading) -> None:
    for choice in event.get("choices") or ():
        _text_event(choice, choice.get("text"), now, reading)
    _openai_usage(event, reading)


def read_chat(event: dict[str, Any], now: float, reading: Reading) -> None:
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        # Reasoning is a part of the answer. Engines differ in the name of its field.
        text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
        if text or "role" not in delta:
            _text_event(choice, text, now, reading)
    _openai_usage(event, reading)


def _text_event(choice: dict[str, Any], text: str | None, now: float, reading: Reading) -> None:
    if text or choice.get("finish_reason") is None:  # tokens whose text is not complete yet come as an empty text
        reading.event(now, 0)
    if text and reading.keep:
        reading.answer_text.append(text)


def _openai_usage(event: dict[str, Any], reading: Reading) -> None:
    usage = event.get("usage")
    if usage:
        details = usage.get("prompt_tokens_details") or {}
        reading.usage(usage["prompt_tokens"], usage["completion_tokens"], details.get("cached_tokens"))


READERS: dict[str, Reader] = {"generate": read_generate, "completions": read_completions, "chat": read_chat}
