"""Computes the figures of a measurement from its records. docs/loadtest.md says what each one means."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, get_args

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.slo import SLO_CLASSES
from loadtest.measure import Measurement
from loadtest.options import Slo
from loadtest.plan import WARM_UP
from loadtest.record import Outcome, Record

PERCENTILES = (50, 90, 95, 99)
Percentiles = dict[str, float]

_OF: dict[str, Callable[[Record], float]] = {  # the figures that an SLO may limit, in seconds
    "ttft": lambda record: record.ttft,
    "gap": lambda record: record.longest_gap,
    "tpot": lambda record: record.tpot or 0.0,
    "e2e": lambda record: record.e2e,
}


class Figures(msgspec.Struct, kw_only=True):
    """The figures of one window. Latencies are of requests that ended well and whose clients read at full speed."""

    name: str
    rate: float | None  # requests per second that were asked for; None if the load is not open
    start: float  # of the window, in seconds
    seconds: float
    sent: int  # in the window
    ok: int
    refused: int
    failed: int
    cancelled: int
    unfinished: int
    slow: int  # of `ok`: answers that a slow reader read
    judged: int  # requests that an SLO can judge: those sent without the cancelled ones and the slow readers'
    errors: dict[str, int]  # failures and refusals by status
    out_tok_s: float  # tokens that arrived in the window, over its seconds
    total_tok_s: float  # the same with the prompt tokens of requests whose first token arrived in the window
    prompt_tokens: int  # of the requests of the window that ended well
    output_tokens: int
    cached_share: float | None  # of their prompt tokens; None if the endpoint does not tell
    events_per_token: float | None
    user_tok_s: float | None  # median of a request's tokens per second after the first token
    ttft_ms: Percentiles | None
    itl_ms: Percentiles | None
    tpot_ms: Percentiles | None
    gap_ms: Percentiles | None
    e2e_ms: Percentiles | None
    refusal_ms: Percentiles | None  # time that a refusal took
    retry_after_s: Percentiles | None
    goodput: dict[str, float]  # good requests per second, by SLO
    lag_ms: Percentiles | None  # by how much requests were sent later than due
    by_class: dict[str, ClassFigures] = {}


class ClassFigures(msgspec.Struct):
    """The figures of the requests of one SLO class. `good` are those that kept the class's own targets."""

    sent: int
    ok: int
    good: int | None  # None if the class promises nothing
    ttft_ms: Percentiles | None
    gap_ms: Percentiles | None


def percentiles(seconds: ArrayLike, scale: float = 1e3) -> Percentiles | None:
    """Return the percentiles by nearest rank, times `scale`: each is a value that occurred. None if there is no value."""
    values = np.asarray(seconds, dtype=np.float64)
    if not values.size:
        return None
    found = np.percentile(values, PERCENTILES, method="inverted_cdf") * scale
    return {f"p{p}": round(float(value), 3) for p, value in zip(PERCENTILES, found, strict=True)}


def is_good(record: Record, slo: Slo) -> bool:
    """Say whether a request ended well and within all limits."""
    return record.outcome == "ok" and all(_OF[name](record) * 1e3 <= limit for name, limit in slo.limits)


def windows(measurement: Measurement, slos: Sequence[Slo]) -> list[Figures]:
    """Return the figures of each step of a load; of a load without steps, those of its one window."""
    steps = measurement.load.steps
    if len(steps) < 2:
        return [whole(measurement, slos)]
    by_step: list[list[Record]] = [[] for _ in steps]
    for record in measurement.records:
        if record.step != WARM_UP:
            by_step[record.step].append(record)
    start, found = 0.0, []
    for step, records in zip(steps, by_step, strict=True):
        rate = (step.rate + step.end_rate) / 2
        found.append(summary(records, measurement.records, slos, name=step.label, rate=rate, start=start, seconds=step.seconds))
        start += step.seconds
    return found


def whole(measurement: Measurement, slos: Sequence[Slo]) -> Figures:
    """Return the figures of the whole measured window. A load that ended early is measured until its end."""
    load = measurement.load
    seconds = load.measured_seconds
    if measurement.interrupted or load.requests is not None:
        seconds = max(min(seconds, measurement.wall_s), 0.001)
    rate = sum((step.rate + step.end_rate) / 2 * step.seconds for step in load.steps) / load.measured_seconds or None
    records = [record for record in measurement.records if record.step != WARM_UP]
    return summary(records, measurement.records, slos, name=load.name, rate=rate, start=0.0, seconds=seconds)


def summary(
    records: Sequence[Record],
    everything: Sequence[Record],
    slos: Sequence[Slo],
    *,
    name: str,
    rate: float | None,
    start: float,
    seconds: float,
) -> Figures:
    """Return the figures of the requests `records`, which were due from `start` on for `seconds`. `everything` also has those of
    other times, whose tokens may have arrived in the window."""
    answered = [record for record in records if record.outcome == "ok"]
    ok = [record for record in answered if not record.slow]
    output, prompt = tokens_in(everything, start, start + seconds)
    return Figures(
        name=name,
        rate=rate,
        start=start,
        seconds=round(seconds, 3),
        slow=len(answered) - len(ok),
        judged=sum(record.outcome != "cancelled" and not record.slow for record in records),
        out_tok_s=round(output / seconds, 1),
        total_tok_s=round((output + prompt) / seconds, 1),
        goodput={slo.text: round(sum(is_good(record, slo) for record in ok) / seconds, 3) for slo in slos},
        lag_ms=percentiles([record.lag for record in records]),
        by_class=_by_class(records),
        **_ends(records),
        **_tokens(answered),
        **_latencies(ok),
    )


def _ends(records: Sequence[Record]) -> dict[str, Any]:
    """Return how the requests ended."""
    outcomes = Counter(record.outcome for record in records)
    refused = [record for record in records if record.outcome == "refused"]
    return {
        "sent": len(records),
        **{outcome: outcomes[outcome] for outcome in get_args(Outcome)},
        "errors": dict(Counter(r.status for r in records if r.outcome in ("refused", "failed")).most_common()),
        "refusal_ms": percentiles([record.e2e for record in refused]),
        "retry_after_s": percentiles([r.retry_after for r in refused if r.retry_after is not None], scale=1),
    }


def _tokens(answered: Sequence[Record]) -> dict[str, Any]:
    """Return the tokens of requests that ended well."""
    tokens = sum(record.output_tokens for record in answered)
    return {
        "prompt_tokens": sum(record.prompt_tokens for record in answered),
        "output_tokens": tokens,
        "cached_share": _cached_share(answered),
        "events_per_token": round(sum(len(record.times) for record in answered) / tokens, 3) if tokens else None,
    }


def _latencies(ok: Sequence[Record]) -> dict[str, Any]:
    """Return the latencies of requests that ended well and whose clients read at full speed."""
    speeds = [1 / record.tpot for record in ok if record.tpot]
    return {
        "user_tok_s": round(float(np.median(speeds)), 2) if speeds else None,
        "ttft_ms": percentiles([record.ttft for record in ok]),
        "itl_ms": percentiles(_all_gaps(ok)),
        "tpot_ms": percentiles([record.tpot for record in ok if record.tpot is not None]),
        "gap_ms": percentiles([record.longest_gap for record in ok]),
        "e2e_ms": percentiles([record.e2e for record in ok]),
    }


def tokens_in(records: Iterable[Record], start: float, end: float) -> tuple[float, int]:
    """Return the output tokens that arrived from `start` to `end`, and the prompt tokens of requests whose first token did."""
    output, prompt = 0.0, 0
    for record in records:
        times = record.times + record.sent
        inside = (times >= start) & (times < end)
        output += float(record.weights[inside].sum())
        if len(inside) and inside[0]:
            prompt += record.prompt_tokens
    return output, prompt


def _all_gaps(records: Iterable[Record]) -> NDArray[np.float32]:
    return np.concatenate([np.empty(0, dtype=np.float32), *(np.diff(record.times) for record in records)])


def _cached_share(records: Sequence[Record]) -> float | None:
    known = [record for record in records if record.cached_tokens is not None]
    prompt = sum(record.prompt_tokens for record in known)
    return round(sum(record.cached_tokens or 0 for record in known) / prompt, 4) if prompt else None


def _by_class(records: Sequence[Record]) -> dict[str, ClassFigures]:
    return {name: _of_class(name, records) for name in SLO_CLASSES if any(record.slo_class == name for record in records)}


def _of_class(name: str, records: Sequence[Record]) -> ClassFigures:
    slo_class = next(slo for slo in SLO_CLASSES.values() if slo.name == name)
    limits = {"ttft": slo_class.ttft, "gap": slo_class.itl}
    slo = Slo(name, tuple((figure, seconds * 1e3) for figure, seconds in limits.items() if seconds is not None))
    mine = [record for record in records if record.slo_class == name]
    ok = [record for record in mine if record.outcome == "ok" and not record.slow]
    good = sum(is_good(record, slo) for record in ok) if slo.limits else None
    ttft, gap = percentiles([record.ttft for record in ok]), percentiles([record.longest_gap for record in ok])
    return ClassFigures(len(mine), sum(record.outcome == "ok" for record in mine), good, ttft, gap)
