"""Measures how long each phase of an engine's start takes, and chooses the folder that keeps compiled kernels between starts.

The phases follow one another without a gap, so their sum is the time of the whole start.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PHASES = {
    "imports": "start the interpreter, import the program and torch",
    "config": "read the settings and config.json",
    "kernels": "on CUDA: install the kernels of kernel_folder, or compile those that are not in Triton's cache",
    "weights": "create the CUDA context, allocate the model, load its weights",
    "memory": "measure the size for the KV cache (on CUDA by running a step) and allocate it",
    "runner": "build the runner, its sampler and its static buffers",
    "prepare": "on CUDA: capture graphs and make plans for long prompts, within startup_budget_s",
    "ready": "build the scheduler, and find the records of a disk tier, within startup_budget_s; then the engine takes requests",
}
_STAT = Path("/proc/self/stat")
_START_TIME = 19  # index of the start time, in clock ticks since boot, among the fields after the program's name in parentheses


Progress = Callable[[], None]  # a function that reports that an engine's start makes progress
PROGRESS_SECONDS = 0.5  # shortest time between two progress reports within a phase


def no_report() -> None:
    """Do nothing. This is the Progress function of an engine without a supervisor."""


class StartupClock:
    """Measures the phases of an engine's start. `seconds` holds the duration of each phase that has ended, in order.

    The first phase began `before` seconds before the clock was created. `report` is called at the end of each phase, and by
    `progress` within a phase.
    """

    def __init__(self, before: float = 0.0, report: Progress = no_report) -> None:
        self._since = time.monotonic() - before
        self._report = report
        self._reported_at = float("-inf")
        self.seconds: dict[str, float] = {}

    def end(self, phase: str) -> None:
        """End `phase` now. The next phase begins at the same moment."""
        now = time.monotonic()
        self.seconds[phase] = now - self._since
        self._since = now
        self._reported_at = now
        self._report()

    def progress(self) -> None:
        """Report progress within a phase, at most every PROGRESS_SECONDS: a tensor was loaded, or a kernel was compiled.

        Any thread may call this method, as often as it likes.
        """
        now = time.monotonic()
        if now - self._reported_at >= PROGRESS_SECONDS:
            self._reported_at = now
            self._report()


def process_seconds() -> float:
    """Return the seconds since this process began, to a hundredth. Without /proc, return its CPU time, which is less."""
    if not _STAT.exists():
        return time.process_time()
    ticks = int(_STAT.read_text().rpartition(")")[2].split()[_START_TIME])
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def keep_kernels() -> None:
    """Set TRITON_CACHE_DIR if it is not set and Triton could not write compiled kernels to its default folder.

    Triton's default is .triton/cache in TRITON_HOME or in the home folder, and Triton fails if it cannot write there. The folder
    that is set instead is tidegate/triton in XDG_CACHE_HOME, or else one of this user among the temporary files. Call this before
    Triton is imported.
    """
    if "TRITON_CACHE_DIR" in os.environ or _writable(
        Path(os.environ.get("TRITON_HOME") or "~").expanduser() / ".triton" / "cache"
    ):
        return
    cache = os.environ.get("XDG_CACHE_HOME")
    folder = Path(cache) / "tidegate" / "triton" if cache else None
    os.environ["TRITON_CACHE_DIR"] = str(folder if folder is not None and _writable(folder) else _temporary())


# A thread of libgomp waits for the others of a step in a loop, by default for about a millisecond. If another program has their
# CPUs, that loop keeps them waiting. This many rounds are about 0.1 ms, and then the thread sleeps.
SPINS = "30000"


def share_cpus() -> None:
    """Let torch's threads give up their CPUs soon while they wait for each other, unless the environment says how they wait.

    Beside two busy programs on two cores, a step of Tidepool takes 39 ms so, and else 568 ms; alone it takes 5% longer. Call this
    before torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def _writable(folder: Path) -> bool:
    """Return whether this process may write to `folder` or, if `folder` does not exist, to its nearest existing parent."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _temporary() -> Path:
    """Return this user's kernel folder among the temporary files, which is the same at each start.

    Compiled kernels in the folder are executed. So a new folder is made instead if another user owns the folder or can write
    to it.
    """
    folder = Path(tempfile.gettempdir()) / f"tidegate-triton-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    safe = folder.is_dir() and not folder.is_symlink() and found.st_uid == os.geteuid() and not found.st_mode & 0o022
    return folder if safe else Path(tempfile.mkdtemp(prefix="tidegate-triton-"))
