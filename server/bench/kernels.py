"""Implements `tidegate bench kernels`, which compares each kernel's time at shapes of real models with the device's bound."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from engine.errors import ConfigError
from server.bench import lines
from server.bench.bounds import Hardware
from server.bench.lines import KernelLine

_ROW = "{:<14} {:<52} {:>10} {:>8} {:>9} {:>9}"
_HEAD = _ROW.format("kernel", "shape", "us", "of bound", "TB/s", "TFLOP/s")


def run(kernels: Sequence[str] = (), *, record: Path | None = None) -> list[KernelLine]:
    """Measure the kernels that are named, or all kernels. Each result is a table row on stderr and a JSON line on stdout.

    The JSON lines are also appended to `record`. Raises ConfigError if there is no CUDA device or no kernel of that name.
    """
    measured = importlib.import_module("engine.kernels.hardware")
    device: str | None = measured.name()
    if device is None:
        raise ConfigError("bench kernels needs a CUDA device, and torch finds none: `tidegate doctor` shows what it finds")
    lines.check_record(record)
    bench = importlib.import_module("engine.kernels.bench")  # needs Triton, which is not installed on every machine
    cases = choose(bench.CASES, kernels)
    hardware = Hardware(*measured.measure())
    console = Console(stderr=True)
    _say(console, f"{device}: {hardware.bandwidth / 1e12:.2f} TB/s, {hardware.rate / 1e12:.0f} TFLOP/s in bfloat16")
    _say(console, _HEAD)
    return [_run_case(bench, case, hardware, device, console, record) for case in cases]


def choose(cases: Sequence[Any], kernels: Sequence[str]) -> list[Any]:
    """Return the benchmark cases of the named kernels, or all cases if none is named. Raises ConfigError for an unknown name."""
    known = {case.kernel: None for case in cases}
    for kernel in kernels:
        if kernel not in known:
            raise ConfigError(f"kernel is {kernel!r}: it must be one of {', '.join(known)}", param="kernel")
    return [case for case in cases if not kernels or case.kernel in kernels]


def _run_case(bench: Any, case: Any, hardware: Hardware, device: str, console: Console, record: Path | None) -> KernelLine:
    timing = bench.measure(case)
    bound = max(timing.num_bytes / hardware.bandwidth, timing.operations / hardware.rate)
    line = KernelLine(
        date=lines.today(),
        commit=lines.commit(),
        device=device,
        kernel=case.kernel,
        shape=case.shape,
        seconds=timing.seconds,
        bound_share=round(bound / timing.seconds, 3),
        bytes_s=round(timing.num_bytes / timing.seconds),
        flop_s=round(timing.operations / timing.seconds),
        command=lines.command(),
    )
    _say(console, row(line))
    lines.write(line, record)
    return line


def row(line: KernelLine) -> str:
    """Format one kernel's result as a table row: kernel, shape, microseconds, share of the bound, TB/s and TFLOP/s."""
    numbers = (f"{line.seconds * 1e6:.1f}", f"{line.bound_share:.0%}", f"{line.bytes_s / 1e12:.2f}", f"{line.flop_s / 1e12:.0f}")
    return _ROW.format(line.kernel, line.shape, *numbers)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
