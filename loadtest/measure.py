"""Measures one load: starts the processes that send it, collects their records, and watches the server's metrics meanwhile."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait

import msgspec

from loadtest.process import LoadProcess, Report, Start
from loadtest.record import Record
from loadtest.scrape import Sample, Scraper
from loadtest.spec import Load, LoadError, Target

_HEAD_START = 0.3  # seconds between Go and the first request, so that all processes are waiting by then
_WATCH_PERIOD = 0.25


class Measurement(msgspec.Struct, kw_only=True):
    """What one load did, as its processes and the server's metrics tell. Times are seconds from the start of the window."""

    load: Load
    target: Target
    records: list[Record] = []
    loop_lags: list[float] = []  # seconds by which the event loops ran late
    cpu_shares: list[float] = []  # of each process: its CPU time over the time that it ran
    samples: list[Sample] = []  # metrics over time; `at` counts from the start of the window
    scrape_failures: int | None = None  # None: the metrics were not read
    wall_s: float = 0.0  # from the start of the window until the last request ended
    interrupted: bool = False
    problem: str = ""  # why the measurement is not whole


class State(msgspec.Struct):
    """How far a measurement is, for the display."""

    measurement: Measurement
    at: float = 0.0
    sent: int = 0
    running: int = 0


Watch = Callable[[State], None]


def measure(load: Load, target: Target, *, procs: int, metrics: str | None, watch: Watch) -> Measurement:
    """Run one load to its end. Raises LoadError if it cannot start. Ctrl-C ends it early and keeps what it has."""
    processes = [LoadProcess(Start(load, target, number, procs)) for number in range(procs)]
    try:
        for process in processes:
            problem = process.read().problem
            if problem:
                raise LoadError(problem)
        return _collect(load, target, processes, metrics, watch)
    finally:
        for process in processes:
            process.close()


def _collect(load: Load, target: Target, processes: Sequence[LoadProcess], metrics: str | None, watch: Watch) -> Measurement:
    measurement = Measurement(load=load, target=target)
    zero = time.perf_counter() + _HEAD_START + load.warm_up
    collector = _Collector(measurement, processes, zero, watch)
    with contextlib.ExitStack() as stack:
        scraper = stack.enter_context(Scraper(metrics)) if metrics else None
        for process in processes:
            process.go(zero)
        try:
            collector.until_done()
        except KeyboardInterrupt:
            measurement.interrupted = True
            for process in processes:
                process.stop()
            with contextlib.suppress(KeyboardInterrupt):  # a second one: the processes are killed, what they have told is kept
                collector.until_done()
        collector.finish()
    if scraper is not None:
        measurement.samples = [Sample(sample.at - zero, sample.values) for sample in scraper.samples]
        measurement.scrape_failures = scraper.failures
    return measurement


class _Collector:
    """Reads the reports of all processes."""

    def __init__(self, measurement: Measurement, processes: Sequence[LoadProcess], zero: float, watch: Watch) -> None:
        self._measurement, self._zero, self._watch = measurement, zero, watch
        self._processes = {process.pipe: process for process in processes}
        self._latest = {process.pipe: Report() for process in processes}
        self._ended = {process.pipe: 0.0 for process in processes}

    def until_done(self) -> None:
        while left := [pipe for pipe, process in self._processes.items() if not process.done]:
            for pipe in wait(left, timeout=_WATCH_PERIOD):
                self._take(self._processes[pipe])  # type: ignore[index]  # they are the pipes that were passed
            latest = self._latest.values()
            sent, running = sum(report.sent for report in latest), sum(report.running for report in latest)
            self._watch(State(self._measurement, time.perf_counter() - self._zero, sent, running))

    def finish(self) -> None:
        """Add what the reports tell about the processes themselves."""
        self._measurement.wall_s = max(self._ended.values())
        begin = -self._measurement.load.warm_up - _HEAD_START
        self._measurement.cpu_shares = [self._latest[pipe].cpu_s / max(end - begin, 1e-9) for pipe, end in self._ended.items()]

    def _take(self, process: LoadProcess) -> None:
        report, measurement = process.read(), self._measurement
        measurement.records += report.records
        measurement.loop_lags += report.lags
        measurement.problem = measurement.problem or report.problem
        if not report.problem:
            self._latest[process.pipe] = report
        self._ended[process.pipe] = time.perf_counter() - self._zero
