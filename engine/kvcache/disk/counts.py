"""Counts: what the disk tier did since its start, for metrics. The thread that polls the store writes them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from engine.kvcache.disk.outcome import Outcome
from engine.kvcache.disk.workers import Ended, Kind
from engine.kvcache.disk.write_policy import Refusal


@dataclass(slots=True)
class Counts:
    moves: Counter[tuple[Kind, Outcome]] = field(default_factory=Counter)  # reads and writes that ended
    bytes: Counter[Kind] = field(default_factory=Counter)  # of payloads that were moved
    seconds: dict[Kind, float] = field(
        default_factory=lambda: dict.fromkeys(Kind, 0.0)
    )  # sum over all threads of the time that these moves took
    refused: Counter[Refusal] = field(default_factory=Counter)  # records that were not written
    dropped: Counter[Outcome] = field(default_factory=Counter)  # records given up: torn, corrupt, foreign or unreadable
    evicted: int = 0
    full_queues: int = 0  # reads refused because the queue was full

    def add(self, ended: Ended, payload_bytes: int) -> None:
        self.moves[ended.kind, ended.outcome] += 1
        if ended.outcome is Outcome.OK:
            self.bytes[ended.kind] += payload_bytes
            self.seconds[ended.kind] += ended.seconds
