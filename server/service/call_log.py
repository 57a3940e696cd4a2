"""Names each call (an HTTP request or a gRPC call), and logs it in one line when it has ended.

The line has the call's id, its route, its status, token counts and times. It has nothing that a client wrote except that id,
whose characters are checked.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import Any

from engine.request import CachedTokens
from server.service.types import Progress

log = logging.getLogger("tidegate.requests")

REQUEST_ID = b"x-request-id"
_ID = re.compile(rb"[A-Za-z0-9._:@/=+-]{1,128}")
_PROBES = ("/health", "/ping", "/metrics", "/grpc.health.v1.")  # routes that are called every few seconds: logged as debug


def request_id(given: bytes | None) -> str:
    """Return the id that a client gave its call, if it can be repeated in a header and a log line; otherwise a new id."""
    return given.decode() if given is not None and _ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"


class CallRecord:
    """Collects what the log says about one call. A call has several generations if it has several prompts.

    `status` is the HTTP status or the name of the gRPC status. `code` is that of the error that ended the call. `ignored` are
    unknown fields that were ignored, since the setting strict_fields is off.
    """

    __slots__ = ("_began", "_is_given", "_progress", "answer_id", "code", "id", "ignored", "route", "status")

    def __init__(self, given: bytes | None, route: str) -> None:
        """`given` is the id that the client gave, or None."""
        self.id = request_id(given)
        self._is_given = given is not None and self.id.encode() == given
        self.route = route
        self.status: int | str = 0
        self.code: str | None = None
        self.answer_id: str | None = None
        self.ignored: tuple[str, ...] = ()
        self._progress: list[Progress] = []
        self._began = time.monotonic()

    def answered_by(self, answer_id: str) -> None:
        """Note the id of the generation that answers the call. A call whose client gave no id gets that one."""
        self.answer_id = answer_id
        if not self._is_given:
            self.id = answer_id

    def new_progress(self) -> Progress:
        """Return the Progress of one more generation of this call."""
        progress = Progress()
        self._progress.append(progress)
        return progress

    @property
    def prompt_tokens(self) -> int:
        return sum(progress.prompt_tokens for progress in self._progress)

    @property
    def cached(self) -> CachedTokens:
        return sum((progress.cached for progress in self._progress), CachedTokens())

    def write(self) -> None:
        """Log the call."""
        level = logging.DEBUG if any(mark in self.route for mark in _PROBES) else logging.INFO
        if log.isEnabledFor(level):
            log.log(level, "request", extra=self._fields())

    def _fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"id": self.id, "route": self.route, "status": self.status}
        if self.answer_id is not None and self.answer_id != self.id:
            fields["answer"] = self.answer_id
        if self.code is not None:
            fields["code"] = self.code
        if self.ignored:
            fields["ignored"] = ", ".join(self.ignored)
        all_ = self._progress
        if all_:
            fields["prompt_tokens"] = self.prompt_tokens
            fields["cached_tokens"] = self.cached.total
            fields["completion_tokens"] = sum(progress.completion_tokens for progress in all_)
            first = [progress for progress in all_ if progress.ttft_s is not None]
            if first:
                fields["queue_ms"] = _ms(max(progress.queue_s for progress in first))
                fields["ttft_ms"] = _ms(min(progress.ttft_s or 0.0 for progress in first))
        return {**fields, "total_ms": _ms(time.monotonic() - self._began)}


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 1)
