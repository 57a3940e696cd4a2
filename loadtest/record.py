"""Records what happened to one request, as the client saw it."""

from __future__ import annotations

from array import array
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

Outcome = Literal["ok", "refused", "failed", "cancelled", "unfinished"]


class Failure(Exception):
    """A request did not get its answer. `status` is short and groups like failures; `detail` is what the server or the network
    said."""

    def __init__(self, status: str, detail: str = "", *, refused: bool = False, retry_after: float | None = None) -> None:
        super().__init__(f"{status}: {detail}" if detail else status)
        self.status = status
        self.detail = detail[:300]
        self.refused = refused  # the server turned the request away because of its load
        self.retry_after = retry_after


class Reading:
    """Collects an answer while it arrives. Times are those of `time.perf_counter`."""

    __slots__ = ("answer_ids", "answer_text", "cached_tokens", "events", "keep", "output_tokens", "prompt_tokens", "tokens")

    def __init__(self, *, keep: bool = False) -> None:
        self.keep = keep  # keep the answer itself: the next turn of a session needs it
        self.events = array("d")  # time of each event that had tokens
        self.tokens = array("H")  # tokens of each event; 0 if the endpoint does not tell
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.answer_ids: list[int] = []
        self.answer_text: list[str] = []

    def event(self, now: float, num_tokens: int) -> None:
        self.events.append(now)
        self.tokens.append(min(num_tokens, 0xFFFF))

    def usage(self, prompt: int, output: int, cached: int | None) -> None:
        self.prompt_tokens, self.output_tokens, self.cached_tokens = prompt, output, cached


class Record(msgspec.Struct, kw_only=True):
    """One request from its due time to its end. Durations are in seconds, and begin when the request was sent."""

    index: int
    session: int | None = None
    turn: int = 0
    step: int  # WARM_UP, or the step of the load
    slo_class: str | None
    slow: bool  # its client read slowly, so its times are the client's own
    at: float  # when it was due, from the start of the measured window
    sent: float  # when it was sent, on the same clock
    outcome: Outcome = "ok"
    status: str = "200"
    detail: str = ""
    retry_after: float | None = None
    max_tokens: int
    prompt_tokens: int  # as the endpoint counted them, or as planned
    output_tokens: int = 0
    cached_tokens: int | None = None
    counted: bool = False  # the endpoint reported its own counts of tokens
    e2e: float  # to the last event, or to the failure
    events: bytes = b""  # float32: time of each event with tokens
    tokens: bytes = b""  # uint16: tokens of each event; 0 if the endpoint does not tell

    @property
    def lag(self) -> float:
        return self.sent - self.at

    @property
    def times(self) -> NDArray[np.float32]:
        return np.frombuffer(self.events, dtype=np.float32)

    @property
    def weights(self) -> NDArray[np.float64]:
        """Return the tokens of each event. Without counts for each event, they share the answer's tokens."""
        counts = np.frombuffer(self.tokens, dtype=np.uint16).astype(np.float64)
        if not len(counts) or counts.all():
            return counts
        return np.full(len(counts), (self.output_tokens or len(counts)) / len(counts))

    @property
    def ttft(self) -> float:
        return float(self.times[0])

    @property
    def longest_gap(self) -> float:
        """Return the longest time between two events, 0 if there is one event only."""
        return float(np.diff(self.times).max(initial=0.0))

    @property
    def tpot(self) -> float | None:
        """Return the mean time of a token after the first one. None if the answer has one token."""
        times = self.times
        return float(times[-1] - times[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else None


def read_into(record: Record, reading: Reading, began: float) -> None:
    """Put what has arrived into the record. `began` is the time at which the request was sent."""
    times = np.array(reading.events) - began
    record.events = times.astype(np.float32).tobytes()
    record.tokens = reading.tokens.tobytes()
    record.counted = reading.output_tokens is not None
    record.prompt_tokens = record.prompt_tokens if reading.prompt_tokens is None else reading.prompt_tokens
    counted = sum(tokens or 1 for tokens in reading.tokens)
    record.output_tokens = counted if reading.output_tokens is None else reading.output_tokens
    record.cached_tokens = reading.cached_tokens
