"""Writes a benchmark's result as one JSON line to standard output and, on request, to the end of a file."""

from __future__ import annotations

import datetime
import shlex
import subprocess
import sys
from pathlib import Path

import msgspec

from engine.errors import ConfigError


class OfflineLine(msgspec.Struct, kw_only=True):
    """The result of one workload on one model. `bound_share` is the least possible time (`server.bench.bounds`) divided by the
    measured time, or null if the hardware's speed is not known."""

    date: str
    commit: str
    device: str
    engine: str = "tidegate"
    model: str
    precision: str
    workload: str
    seconds: float
    out_tok_s: float
    total_tok_s: float
    startup_s: float  # from the start of the process (first engine) or of the engine (later ones) until it could take a request
    bound_share: float | None
    command: str
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    num_steps: int
    exposed_cpu_s: float
    load_format: str
    rounds: list[float]  # seconds of each round; the field `seconds` is the shortest of them
    warm_up_s: float
    startup: dict[str, float]  # phase of the engine's start -> seconds
    bandwidth: float | None  # bytes read and written per second by a copy within device memory; null if not measured
    rate: float | None  # measured floating-point operations per second; null if not measured


class KernelLine(msgspec.Struct, kw_only=True):
    """The result of one kernel at one shape. `bound_share` is the device's least possible time divided by the measured time."""

    date: str
    commit: str
    device: str
    engine: str = "tidegate"
    kernel: str
    shape: str
    seconds: float
    bound_share: float
    bytes_s: float
    flop_s: float
    command: str


class CompileLine(msgspec.Struct, kw_only=True):
    """The result of `tidegate compile`: how many kernels of one model, their bytes, and the seconds that it took."""

    date: str
    commit: str
    device: str  # the GPU that the kernels are for
    engine: str = "tidegate"
    model: str
    precision: str
    kernels: int
    bytes: int
    seconds: float
    command: str


class PlannedRate(msgspec.Struct, kw_only=True):
    """What one simulated replica makes of a rate. A latency is null if no request had a first token."""

    rate: float
    good_share: float  # of all requests, refused ones included
    goodput: float
    ttft_p99_ms: float | None
    gap_p99_ms: float | None
    refused: int
    busy: float  # share of the time in which the device ran a step


class PlannedCard(msgspec.Struct, kw_only=True):
    """How many replicas of one card keep a load. `replicas` is 0 if no number does; `why_not` then says why."""

    device: str
    model: str
    precision: str
    kv_tokens: int
    kept_rate: float  # highest rate that one replica keeps
    replicas: int
    why_not: str | None
    rates: list[PlannedRate]


class PlanLine(msgspec.Struct, kw_only=True):
    """The result of `tidegate bench plan`: a load, its targets, and the cards that were simulated."""

    date: str
    commit: str
    engine: str = "tidegate"
    workload: str
    rate: float
    ttft_ms: float
    gap_ms: float
    share: float
    prefix: int  # tokens with which all prompts begin
    cv: float  # coefficient of variation of the time between two arrivals; 1 is Poisson
    batching: str
    cards: list[PlannedCard]
    command: str


class CostLine(msgspec.Struct, kw_only=True):
    """The result of `tidegate bench cost`: the error of the file that was written, on steps that it was not fitted to."""

    date: str
    commit: str
    device: str
    engine: str = "tidegate"
    model: str
    precision: str
    steps: int
    held_out: int
    error: float  # median relative error on held-out steps
    error_p90: float
    seconds: float
    file: str
    command: str


Line = OfflineLine | KernelLine | CompileLine | PlanLine | CostLine


def check_record(record: Path | None) -> None:
    """Raise ConfigError if results cannot be appended to the file `record`. Call this before measuring, which may take hours."""
    if record is None:
        return
    try:
        record.open("a").close()
    except OSError as error:
        raise ConfigError(f"record is {str(record)!r}, which cannot be written: {error}", param="record") from None


def write(line: Line, record: Path | None) -> None:
    """Print the result as one line of JSON on standard output, and append it to the file `record` if one is given."""
    text = msgspec.json.encode(line).decode() + "\n"
    sys.stdout.write(text)
    sys.stdout.flush()
    if record is not None:
        with record.open("a") as file:
            file.write(text)


def today() -> str:
    return datetime.date.today().isoformat()


def command() -> str:
    """Return the command line of this process, as a user would type it."""
    name = Path(sys.argv[0]).name  # the name is __main__.py if the command was `python -m server`
    return shlex.join(["tidegate" if name == "__main__.py" else name, *sys.argv[1:]])


def commit() -> str:
    """Return the short commit id of the source tree that holds this code, or "unknown" for an installed copy. A "+" at the end
    means that files have changed since that commit."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
