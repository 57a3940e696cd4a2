"""Sums up simulated requests: latencies, goodput and refusals.

A request is good if it ended and both its time to first token and its longest gap between two tokens are within the target.
Refused requests are counted apart: they are in no percentile, and they are not good.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import msgspec

from engine.slo import INTERACTIVE
from server.bench.simulate import Run, Served

PERCENTILES = (50, 95, 99)


class Target(NamedTuple):
    """Seconds within which a request is good."""

    ttft: float
    gap: float


TARGET = Target(INTERACTIVE.ttft or math.inf, INTERACTIVE.itl or math.inf)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles are in milliseconds, and empty if no request has ended."""

    sent: int
    ok: int
    refused: int
    unfinished: int  # ended by their deadline, or by the end of the simulation
    good: int
    goodput: float  # good requests a second of the load
    ttft_ms: dict[str, float]
    gap_ms: dict[str, float]  # of each request's longest gap
    itl_ms: dict[str, float]  # of all gaps
    tpot_ms: dict[str, float]  # of each request's mean gap
    e2e_ms: dict[str, float]
    refusal_ms: dict[str, float]  # from the arrival to the refusal
    out_tok_s: float


def percentile(values: Iterable[float], percent: float) -> float:
    """Return the smallest value that `percent` of `values`, of which there must be one at least, do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def outcome(served: Sequence[Served], seconds: float, target: Target = TARGET) -> Outcome:
    """Sum up the requests of a load that took `seconds` to arrive."""
    ok = [one for one in served if one.ok]
    refused = [one for one in served if one.refused is not None]
    good = sum(one.good(*target) for one in ok)
    return Outcome(
        sent=len(served),
        ok=len(ok),
        refused=len(refused),
        unfinished=len(served) - len(ok) - len(refused),
        good=good,
        goodput=round(good / seconds, 2),
        ttft_ms=_percentiles(one.ttft for one in ok),
        gap_ms=_percentiles(one.longest_gap for one in ok),
        itl_ms=_percentiles(chain.from_iterable(one.gaps for one in ok)),
        tpot_ms=_percentiles(one.tpot for one in ok),
        e2e_ms=_percentiles(one.e2e for one in ok),
        refusal_ms=_percentiles(one.refused_at - one.arrival.at for one in refused),
        out_tok_s=round(sum(len(one.gaps) + 1 for one in ok) / seconds, 1),
    )


def _percentiles(seconds: Iterable[float]) -> dict[str, float]:
    values = list(seconds)
    return {f"p{percent}": round(1e3 * percentile(values, percent), 1) for percent in PERCENTILES} if values else {}


class Phase(NamedTuple):
    """What happened to the steps in a part of a run."""

    p99_step_ms: float
    longest_step_ms: float
    changes: int
    settled_after: float  # seconds until no second has more than one change of the limits


def phase(run: Run, begin: float, end: float) -> Phase:
    """Sum up the steps that began, and the limits that changed, from `begin` to `end` seconds."""
    seconds = [step.seconds for step in run.steps if begin <= step.at < end]
    changes = Counter({at: number for at, number in limit_changes(run) if begin <= at < end})
    times = sorted(changes.elements())
    crowded = [later for earlier, later in pairwise(times) if later - earlier < 1.0]
    settled = crowded[-1] - begin if crowded else 0.0
    return Phase(round(1e3 * percentile(seconds, 99), 1), round(1e3 * max(seconds), 1), len(times), round(settled, 2))


def limit_changes(run: Run) -> list[tuple[float, int]]:
    """Return when the limits of a step have changed, and how often at each of these moments."""
    found, before = [], 0
    for at, stats in run.samples:
        number = sum(stats.limit_changes.values())
        if number > before:
            found.append((at, number - before))
        before = number
    return found
