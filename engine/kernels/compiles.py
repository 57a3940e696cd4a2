"""Reports and counts the kernels that Triton compiles, so that a process which compiles for minutes is not taken for a hung one,
and operators see when requests wait for a compiler."""

from __future__ import annotations

from typing import Any

from triton import knobs

from engine.startup import Progress


class CompileCounter:
    """Counts the kernels that this process compiled. `progress` is called for each, and for each that Triton's cache had."""

    def __init__(self, progress: Progress) -> None:
        self.count = 0
        self._progress = progress

    def __call__(self, *, cache_hit: bool, **_: Any) -> None:
        self.count += not cache_hit
        self._progress()


def count(progress: Progress) -> CompileCounter:
    """Count every kernel that Triton compiles in this process from now on."""
    knobs.compilation.listener = counter = CompileCounter(progress)
    return counter
