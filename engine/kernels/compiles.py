"""Reports each kernel that Triton compiles, so that a process which compiles for minutes is not taken for a hung one."""

from __future__ import annotations

from typing import Any

from triton import knobs

from engine.startup import Progress


def report(progress: Progress) -> None:
    """Call `progress` each time that Triton compiles a kernel in this process, or finds the compiled kernel in its cache."""

    def compiled(**_: Any) -> None:
        progress()

    knobs.compilation.listener = compiled
