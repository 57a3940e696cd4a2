"""Shows the figures of a measurement as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from loadtest.figures import Figures, Percentiles, whole, windows
from loadtest.line import About, client_of, limits_of, workload
from loadtest.measure import Measurement
from loadtest.options import Slo
from loadtest.scrape import LIMITS

LATE_MS = 20.0  # lag above which the latencies are also the load test's own
_CACHED = 0.05  # share of cached prompt tokens above which a load of fresh prompts was not fresh


def show(measurement: Measurement, slos: Sequence[Slo], about: About, console: Console) -> None:
    """Print the tables of one measurement, and below them what a reader should know before using the figures."""
    found = windows(measurement, slos)
    target = measurement.target
    console.print(f"\n[bold]{workload(measurement, about)}[/] at {target.url} ({target.model}), seed {measurement.load.seed}")
    console.print(_windows(found, slos), "")
    figures = whole(measurement, slos)
    console.print(_latencies(figures), "")
    console.print(_goodput(figures, slos), "")
    user = "-" if figures.user_tok_s is None else f"{figures.user_tok_s:.1f}"
    console.print(
        f"tokens/s: {figures.out_tok_s:.0f} output, {figures.total_tok_s:.0f} with prompts, {user} a user", highlight=False
    )
    for line in remarks(measurement, found):
        console.print(line, highlight=False)


def _windows(found: Sequence[Figures], slos: Sequence[Slo]) -> Table:
    """Return one row for each step of the load."""
    table = _table("load", "sent", "ok", "refused", "failed", "cancelled", "tok/s", "TTFT P50", "TTFT P99", "gap P99", "good/s")
    for f in found:
        counts = [str(n) for n in (f.sent, f.ok, f.refused, f.failed + f.unfinished, f.cancelled)]
        times = [_ms(f.ttft_ms, "p50"), _ms(f.ttft_ms, "p99"), _ms(f.gap_ms, "p99")]
        table.add_row(f.name, *counts, f"{f.out_tok_s:.0f}", *times, f"{f.goodput[slos[0].text]:.2f}")
    return table


def _latencies(figures: Figures) -> Table:
    table = _table("ms", "P50", "P90", "P95", "P99")
    names = {
        "ttft": "TTFT",
        "itl": "ITL",
        "tpot": "TPOT",
        "gap": "longest gap",
        "e2e": "E2E",
        "refusal": "refusal",
        "lag": "sent late",
    }
    for name, text in names.items():
        found: Percentiles | None = getattr(figures, f"{name}_ms")
        if found is not None:
            table.add_row(text, *(_ms(found, p) for p in ("p50", "p90", "p95", "p99")))
    return table


def _goodput(figures: Figures, slos: Sequence[Slo]) -> Table:
    table = _table("good if (ms)", "requests/s", "share")
    for slo in slos:
        good = figures.goodput[slo.text]
        table.add_row(slo.text, f"{good:.2f}", f"{good * figures.seconds / max(1, figures.judged):.1%}")
    return table


def _table(first: str, *heads: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right")
    return table


def _ms(found: Percentiles | None, p: str) -> str:
    return "-" if found is None else f"{found[p]:.3g}" if found[p] < 100 else f"{found[p]:.0f}"


def _cell(found: Percentiles | None) -> str:
    return "-" if found is None else " / ".join(f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in found.values())


def remarks(measurement: Measurement, found: Sequence[Figures]) -> list[str]:
    """Return what the tables do not show: errors, the client's own lag, the cache, the limits."""
    lines = [f"{f.name}: {count} of {f.sent} requests: {status}" for f in found for status, count in f.errors.items()]
    details = {r.status: r.detail for r in measurement.records if r.outcome == "failed" and r.detail}
    lines += [f"  {status}: {detail}" for status, detail in details.items()]
    lines += [f"{f.name}: {f.slow} answers were read slowly; the latencies leave them out" for f in found if f.slow]
    lines += [*_of_classes(found), _of_client(measurement, found), *_of_cache(measurement, found), *_of_limits(measurement)]
    if measurement.interrupted:
        lines.append("interrupted: the figures end there")
    if measurement.problem:
        lines.append(f"not whole: {measurement.problem}")
    return lines


def _of_classes(found: Sequence[Figures]) -> list[str]:
    lines = []
    for f in found:
        for name, figures in f.by_class.items():
            good = "promises nothing" if figures.good is None else f"{figures.good} kept the class's targets"
            ttft, gap = _cell(figures.ttft_ms), _cell(figures.gap_ms)
            lines.append(f"{f.name}, class {name}: {figures.ok} of {figures.sent} ok, {good}; TTFT {ttft}; longest gap {gap} ms")
    return lines


def _of_client(measurement: Measurement, found: Sequence[Figures]) -> str:
    client = client_of(measurement)
    sent = max((f.lag_ms["p99"] for f in found if f.lag_ms), default=0.0)
    loop = (client["loop_lag_ms"] or {"p99": 0.0})["p99"]
    shares = ", ".join(f"{share:.0%}" for share in client["cpu_shares"])
    text = f"load test itself: sent {sent:.1f} ms late (P99), event loop {loop:.1f} ms late (P99), CPU of its processes {shares}"
    late = max(sent, loop) > LATE_MS
    return text + ("; the latencies are in part its own: use more --procs, or another machine" if late else "")


def _of_cache(measurement: Measurement, found: Sequence[Figures]) -> list[str]:
    load = measurement.load
    shares = [f.cached_share for f in found if f.cached_share is not None]
    if not shares or load.prefix or load.sessions or max(shares) <= _CACHED:
        return []
    return [
        f"up to {max(shares):.0%} of the prompt tokens were in the server's prefix cache, though no prompts share a prefix: "
        "an earlier load had the same seed; choose another --seed"
    ]


def _of_limits(measurement: Measurement) -> list[str]:
    limits = limits_of(measurement)
    if limits is None:
        return ["the server's metrics were not read: name their URL with --metrics"] if measurement.target.is_tidegate else []
    lines = []
    for label in LIMITS:
        found = limits[label]
        if isinstance(found, str):
            lines.append(f"{label}: {found}")
        else:
            seen = f"{found['min']:g} to {found['max']:g}, {found['changes']} changes seen, {found['last']:g} at the end"
            lines.append(f"{label}: {seen}")
    if limits.get("policies"):
        changes = ", ".join(f"{count:g} for {reason}" for reason, count in limits["server's changes"].items())
        lines.append(
            f"batching policy: {', '.join(limits['policies'])}; the server counted changes of limits: {changes or 'none'}"
        )
    return lines
