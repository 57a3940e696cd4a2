"""Finds the number of CPUs that a parallel test run may use."""

import math
import os
from pathlib import Path

CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # holds "QUOTA PERIOD" in microseconds, or "max PERIOD" for no limit


def usable_cpus() -> int:
    """Return how many CPUs this process may use: its affinity, or the quota of its control group if that is less."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = CGROUP_LIMIT.read_text().split() if CGROUP_LIMIT.exists() else ("max", "1")
    return available if quota == "max" else max(1, min(available, math.ceil(int(quota) / int(period))))
