"""Runs the measurements of `python -m loadtest run` one after the other. The results of each are written at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console

from loadtest import scrape
from loadtest.line import About, check_writable, line_of, workload, write_line
from loadtest.measure import Measurement, measure
from loadtest.options import Slo
from loadtest.page import write_page
from loadtest.probe import probe
from loadtest.progress import Progress
from loadtest.spec import Load, LoadError, Target
from loadtest.table import show


class Output(NamedTuple):
    """Where the results go, beside the terminal."""

    record: Path | None = None  # JSON lines are appended
    page: Path | None = None  # .html or .png
    raw: Path | None = None  # one JSON line for each request

    def check(self) -> None:
        """Raise LoadError for a file that could not be written after the load."""
        if self.page is not None and self.page.suffix not in (".html", ".png"):
            raise LoadError(f"--page is {self.page}: its name must end with .html or .png")
        check_writable(self.record, self.page, self.raw)


def run_loads(
    loads: Sequence[Load],
    target: Target,
    slos: Sequence[Slo],
    about: About,
    output: Output,
    *,
    procs: int,
    metrics: str | None,
    console: Console,
) -> list[Measurement]:
    """Measure all loads. An interrupted one is the last. Raises LoadError before the first request if something is wrong."""
    output.check()
    probed = probe(target, loads[0])  # the loads of a run differ in their arrivals only
    metrics = metrics_url(probed, metrics)
    done: list[Measurement] = []
    for load in loads:
        with Progress(console, workload(Measurement(load=load, target=probed), about)) as progress:
            measurement = measure(load, probed, procs=procs, metrics=metrics, watch=progress)
        done.append(measurement)
        show(measurement, slos, about, console)
        write_line(line_of(measurement, slos, about), output.record)
        write_raw(measurement, output.raw)
        if measurement.interrupted or measurement.problem:
            break
    if output.page is not None:
        write_page(done, slos, about, output.page)
        console.print(f"plots: {output.page}", highlight=False)
    return done


def metrics_url(target: Target, given: str | None) -> str | None:
    """Return the URL of the server's metrics, or None if it has none that we know."""
    if given is not None:
        return scrape.check(given, asked=True)
    if not target.is_tidegate or target.route == "grpc":
        return None
    return scrape.check(target.url.rstrip("/") + "/metrics", asked=False)


def write_raw(measurement: Measurement, path: Path | None) -> None:
    """Append a line for each request to `path`: its times, counts and outcome."""
    if path is None:
        return
    with path.open("a") as file:
        for record in measurement.records:
            fields = {key: value for key, value in msgspec.structs.asdict(record).items() if key != "tokens"}
            fields |= {"load": measurement.load.number, "events": [round(float(time), 4) for time in record.times]}
            file.write(msgspec.json.encode(fields).decode() + "\n")
