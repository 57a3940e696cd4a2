"""A result as one JSON line: on standard output, and at the end of a file where one is asked for."""

from __future__ import annotations

import datetime
import shlex
import subprocess
import sys
from pathlib import Path

import msgspec

from engine.errors import ConfigError


class OfflineLine(msgspec.Struct, kw_only=True):
    """`bound_share` is the bound's seconds over those measured, and null where the hardware's figures are not known."""

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
    startup_s: float  # from the process's start, or from that of a later model's engine, until a request could come
    bound_share: float | None
    command: str
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    num_steps: int
    exposed_cpu_s: float
    load_format: str
    rounds: list[float]  # seconds of each; `seconds` is the least
    warm_up_s: float
    startup: dict[str, float]  # seconds by phase
    bandwidth: float | None  # of the device as measured, in bytes a second, and
    rate: float | None  # floating-point operations a second


class KernelLine(msgspec.Struct, kw_only=True):
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


Line = OfflineLine | KernelLine


def check_record(record: Path | None) -> None:
    """Raise ConfigError where `write` could not append: said before hours of measuring."""
    if record is None:
        return
    try:
        record.open("a").close()
    except OSError as error:
        raise ConfigError(f"record is {str(record)!r}, which cannot be written: {error}", param="record") from None


def write(line: Line, record: Path | None) -> None:
    text = msgspec.json.encode(line).decode() + "\n"
    sys.stdout.write(text)
    sys.stdout.flush()
    if record is not None:
        with record.open("a") as file:
            file.write(text)


def today() -> str:
    return datetime.date.today().isoformat()


def command() -> str:
    name = Path(sys.argv[0]).name  # __main__.py: by `python -m server`
    return shlex.join(["tidegate" if name == "__main__.py" else name, *sys.argv[1:]])


def commit() -> str:
    """Of the source tree that this runs from; an installed copy has none."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
