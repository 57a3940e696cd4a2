"""How long an engine takes to start, phase by phase, and where its compiled kernels are kept for the next start.

Phases follow one another without a gap: their sum is the whole. `PHASES` says what each holds.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PHASES = {
    "imports": "the interpreter, this program and torch",
    "config": "settings and config.json",
    "weights": "CUDA's context, memory for the model, and its weights in it",
    "memory": "the size of the KV cache, found on CUDA by running a step, and the cache",
    "runner": "the runner with its sampler and static inputs",
    "ready": "the scheduler, until a request can come",
}
_STAT = Path("/proc/self/stat")
_START_TIME = 19  # of the fields after the program's name in parentheses: clock ticks from boot to the process's start


Progress = Callable[[], None]  # reports that a start, or a part of one, makes progress
PROGRESS_SECONDS = 0.5  # between two reports at least


def no_report() -> None:
    """The Progress of an engine that nobody watches."""


class StartupClock:
    """Seconds of each phase that has ended, in order. The first phase began `before` seconds before the clock was made.

    `report` is called at the end of each phase, and by `progress` in between.
    """

    def __init__(self, before: float = 0.0, report: Progress = no_report) -> None:
        self._since = time.monotonic() - before
        self._report = report
        self._reported_at = float("-inf")
        self.seconds: dict[str, float] = {}

    def end(self, phase: str) -> None:
        """End `phase` now, and begin the next one."""
        now = time.monotonic()
        self.seconds[phase] = now - self._since
        self._since = now
        self._reported_at = now
        self._report()

    def progress(self) -> None:
        """Report progress within a phase: a tensor was loaded, a kernel was compiled. Any thread may call it, and often."""
        now = time.monotonic()
        if now - self._reported_at >= PROGRESS_SECONDS:
            self._reported_at = now
            self._report()


def process_seconds() -> float:
    """How long this process has run, to a hundredth; without a /proc, the CPU time that it has used, which is less."""
    if not _STAT.exists():
        return time.process_time()
    ticks = int(_STAT.read_text().rpartition(")")[2].split()[_START_TIME])
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def keep_kernels() -> None:
    """Point Triton, before it is imported, to a folder for compiled kernels, where it could not write to its own choice.

    Its own is TRITON_CACHE_DIR, else .triton/cache in TRITON_HOME or the home folder; without a folder it cannot run. Ours is
    tidegate/triton in XDG_CACHE_HOME, or else a folder of this user's in the one for temporary files.
    """
    if "TRITON_CACHE_DIR" in os.environ or _writable(
        Path(os.environ.get("TRITON_HOME") or "~").expanduser() / ".triton" / "cache"
    ):
        return
    cache = os.environ.get("XDG_CACHE_HOME")
    ours = Path(cache) / "tidegate" / "triton" if cache else None
    os.environ["TRITON_CACHE_DIR"] = str(ours if ours is not None and _writable(ours) else _temporary())


def _writable(folder: Path) -> bool:
    """Whether `folder`, or the nearest one above it that exists, lets this process write."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _temporary() -> Path:
    """The same at each start, unless somebody else made it: what lies in it is run."""
    folder = Path(tempfile.gettempdir()) / f"tidegate-triton-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    safe = folder.is_dir() and not folder.is_symlink() and found.st_uid == os.geteuid() and not found.st_mode & 0o022
    return folder if safe else Path(tempfile.mkdtemp(prefix="tidegate-triton-"))
