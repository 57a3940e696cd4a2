"""Makes the JSON line of a measurement, in the form of all benchmark lines of this project."""

from __future__ import annotations

import itertools
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from loadtest.figures import Figures, percentiles, whole, windows
from loadtest.measure import Measurement
from loadtest.options import Slo
from loadtest.scrape import CHANGES, LIMITS, POLICY
from loadtest.spec import LoadError
from server.bench import lines

_STEP_KEYS = ("name", "rate", "start", "seconds", "sent", "ok", "refused", "failed", "out_tok_s", "ttft_ms", "gap_ms", "goodput")


class About(msgspec.Struct, frozen=True):
    """What the user says about the machine that serves, for the lines and the page."""

    device: str | None = None
    engine: str | None = None
    precision: str | None = None
    gpus: int = 1
    shape: str | None = None  # name of the shape of lengths, if one was named
    tag: str | None = None


def line_of(measurement: Measurement, slos: Sequence[Slo], about: About) -> dict[str, Any]:
    """Return the line of one measurement."""
    load, target = measurement.load, measurement.target
    figures = whole(measurement, slos)
    counts = msgspec.to_builtins(figures)
    steps = windows(measurement, slos) if len(load.steps) > 1 else []
    for key in ("name", "start", "seconds", "out_tok_s", "total_tok_s"):
        del counts[key]
    if not counts["by_class"]:
        del counts["by_class"]
    return {
        "date": lines.today(),
        "commit": lines.commit(),
        "device": about.device,
        "engine": about.engine or ("tidegate" if target.is_tidegate else None),
        "model": target.model,
        "precision": about.precision,
        "workload": workload(measurement, about),
        "seconds": figures.seconds,
        "out_tok_s": figures.out_tok_s,
        "total_tok_s": figures.total_tok_s,
        **({"tag": about.tag} if about.tag else {}),
        "route": target.route,
        **counts,
        "wall_s": round(measurement.wall_s, 2),
        "warm_up_s": load.warm_up,
        "seed": load.seed,
        "client": client_of(measurement),
        "limits": limits_of(measurement),
        **({"steps": [_step(step) for step in steps]} if steps else {}),
        **({"interrupted": True} if measurement.interrupted else {}),
        **({"problem": measurement.problem} if measurement.problem else {}),
        "command": command(),
    }


def workload(measurement: Measurement, about: About) -> str:
    """Return the name of the workload: its shape of lengths and of arrivals."""
    load = measurement.load
    if load.trace or load.sessions:
        return load.name
    lengths = about.shape or ("lengths of a file" if load.pairs else f"{load.prompt.middle:.0f}x{load.output.middle:.0f}")
    burst = "" if not load.steps or load.burstiness == 1 else f", burstiness {load.burstiness:g}"
    return f"{lengths} {load.name}{burst}"


def client_of(measurement: Measurement) -> dict[str, Any]:
    """Return how the load test itself fared. Late sending or a late event loop means that its figures are its own."""
    shares = [round(share, 3) for share in measurement.cpu_shares]
    lags = measurement.loop_lags
    longest = round(max(lags) * 1e3, 1) if lags else None
    return {"procs": len(shares), "cpu_shares": shares, "loop_lag_ms": percentiles(lags), "loop_lag_max_ms": longest}


def limits_of(measurement: Measurement) -> dict[str, Any] | None:
    """Return the limits of the server's steps as first and last seen, their range, and how often they changed. None if the
    server's metrics were not read."""
    if measurement.scrape_failures is None:
        return None
    inside = [sample.values for sample in measurement.samples if 0 <= sample.at <= measurement.load.measured_seconds]
    found: dict[str, Any] = {"samples": len(inside), "scrape_failures": measurement.scrape_failures}
    for label, series in LIMITS.items():
        values = [sample[label] for sample in inside if label in sample]
        found[label] = f"the server has no series {series}"
        if values:
            changes = sum(a != b for a, b in itertools.pairwise(values))
            found[label] = {"first": values[0], "last": values[-1], "min": min(values), "max": max(values), "changes": changes}
    if inside:
        reasons = [key for key in inside[-1] if key.startswith(CHANGES)]
        counted = {key.removeprefix(CHANGES): inside[-1][key] - inside[0].get(key, 0.0) for key in reasons}
        found["server's changes"] = {reason: count for reason, count in counted.items() if count}
        found["policies"] = sorted({key.removeprefix(POLICY) for sample in inside for key in sample if key.startswith(POLICY)})
    return found


def _step(figures: Figures) -> dict[str, Any]:
    return {key: value for key, value in msgspec.to_builtins(figures).items() if key in _STEP_KEYS}


def command() -> str:
    """Return the command line as a user would type it, without the values of API keys."""
    words, hidden = [], False
    for word in sys.argv[1:]:
        option, equals, _ = word.partition("=")
        is_key = option in ("--api-key", "--api-key-b")
        words.append("***" if hidden else f"{option}=***" if is_key and equals else word)
        hidden = is_key and not equals
    return shlex.join(["python", "-m", "loadtest", *words])


def check_writable(*paths: Path | None) -> None:
    """Raise LoadError if a result could not be written later. A load may take an hour."""
    for path in filter(None, paths):
        try:
            path.open("a").close()
        except OSError as error:
            raise LoadError(f"{path} cannot be written: {error.strerror}") from None


def write_line(line: dict[str, Any], record: Path | None) -> None:
    """Print a line on standard output, and append it to the file `record`."""
    text = json.dumps(line)
    print(text, flush=True)
    if record is not None:
        with record.open("a") as file:
            file.write(text + "\n")
