"""Shows a load while it runs: a line that changes at a terminal, or a line every ten seconds otherwise."""

from __future__ import annotations

from rich.console import Console
from rich.live import Live
from rich.text import Text

from loadtest.figures import percentiles
from loadtest.measure import State

_LATEST = 5.0  # seconds of requests that the latencies are of
_PLAIN_PERIOD = 10.0


class Progress:
    """Use it as a context manager, and call it with each State."""

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._next = 0.0

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, state: State) -> None:
        if self._live is not None:
            self._live.update(Text(text_of(state, self._title)), refresh=True)
        elif state.at >= self._next:
            self._console.print(text_of(state, self._title), highlight=False)
            self._next = state.at + _PLAIN_PERIOD


def text_of(state: State, title: str) -> str:
    """Return one line on how far the load is and how the latest requests fared."""
    load, records = state.measurement.load, state.measurement.records
    number, step = 0, ""
    for number, candidate in enumerate(load.steps, 1):
        step = f", step {number} of {len(load.steps)}: {candidate.label}"
        if state.at < sum(s.seconds for s in load.steps[:number]):
            break
    phase = "warm-up" if state.at < 0 else "draining" if state.at > load.measured_seconds else f"{state.at:.0f} s"
    latest = []
    for record in reversed(records):  # they come in order of their ends, so the latest are the last
        if record.sent + record.e2e < state.at - _LATEST:
            break
        latest.append(record)
    ok = [record for record in latest if record.outcome == "ok"]
    bad = sum(record.outcome in ("refused", "failed") for record in records)
    ttft, gap = percentiles([r.ttft for r in ok]), percentiles([r.longest_gap for r in ok])
    times = f", TTFT P50 {ttft['p50']:.0f} P99 {ttft['p99']:.0f} ms, longest gap P99 {gap['p99']:.0f} ms" if ttft and gap else ""
    speed = sum(r.output_tokens for r in ok) / _LATEST
    where = f"{phase} of {load.measured_seconds:.0f} s{step if len(load.steps) > 1 else ''}"
    return f"{title}: {where}; {state.sent} sent, {state.running} running, {bad} refused or failed, {speed:.0f} tok/s{times}"
