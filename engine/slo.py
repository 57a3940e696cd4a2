"""SLO classes: what latency a class of requests is promised. Routes name a class, the scheduler orders by it, the controller of
the batch keeps its targets."""

from __future__ import annotations

from typing import Literal, NamedTuple

UNPROMISED_SECONDS = 60.0

SloName = Literal["interactive", "standard", "batch"]


class SloClass(NamedTuple):
    """Describes one class. Durations are in seconds; None means that nothing is promised."""

    name: SloName
    rank: int  # a smaller rank goes first
    ttft: float | None  # time to first token
    itl: float | None  # time between two tokens of one output

    @property
    def patience(self) -> float:
        """Seconds after which a waiting request is late. Where nothing is promised, a minute, which only orders requests."""
        return UNPROMISED_SECONDS if self.ttft is None else self.ttft


INTERACTIVE = SloClass("interactive", 0, ttft=0.5, itl=0.05)
STANDARD = SloClass("standard", 1, ttft=2.0, itl=0.1)
BATCH = SloClass("batch", 2, ttft=None, itl=None)

SLO_CLASSES: dict[SloName, SloClass] = {slo.name: slo for slo in (INTERACTIVE, STANDARD, BATCH)}
DEFAULT_SLO: SloName = "standard"  # class of a request for which neither the client nor the operator has named one
