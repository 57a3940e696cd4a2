"""Writes the fields of a stream's events that a client asks for by `stream_options`, in OpenAI's form."""

from __future__ import annotations

import secrets
from typing import Any

from server.http.routes.api import openai_usage
from server.http.schemas.openai import EventOptions
from server.service.call_log import CallRecord
from server.service.types import Chunk, Usage

_PADDED_BYTES = 32  # text and obfuscation of an event together have a multiple of this many bytes
_NOISE = secrets.token_urlsafe(3072)


class EventExtras:
    """Makes the additional fields of each event of one stream. `any` is whether there are any."""

    def __init__(self, options: EventOptions, call: CallRecord) -> None:
        self._options = options
        self._call = call
        self._num_tokens = 0
        self.any = options.usage_so_far or options.obfuscation

    @property
    def head(self) -> dict[str, Any]:
        """The fields that are equal in all events. If only the last event has a usage, the others say that they have none."""
        return {"usage": None} if self._options.usage and not self._options.usage_so_far else {}

    def fields(self, chunk: Chunk | None) -> dict[str, Any]:
        """Return the additional fields of the event for `chunk`; None stands for an event without text or tokens."""
        fields: dict[str, Any] = {}
        if self._options.usage_so_far:
            self._num_tokens += 0 if chunk is None else len(chunk.token_ids)
            fields["usage"] = openai_usage(
                Usage(
                    prompt_tokens=self._call.prompt_tokens,
                    cached=self._call.cached,
                    completion_tokens=self._num_tokens,
                )
            )
        if self._options.obfuscation:
            num_bytes = 0 if chunk is None else len(chunk.text.encode())
            start = secrets.randbelow(len(_NOISE) - _PADDED_BYTES)
            fields["obfuscation"] = _NOISE[start : start + _PADDED_BYTES - num_bytes % _PADDED_BYTES]
        return fields

    def last(self, usage: Usage | None) -> dict[str, Any] | None:
        """Return the fields of the event after the text of all outputs, or None if the client did not ask for that event."""
        if not self._options.usage or usage is None:
            return None
        return {"choices": [], "usage": openai_usage(usage)}
