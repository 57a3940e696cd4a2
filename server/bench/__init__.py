"""Implements `tidegate bench`, which measures how fast this machine is.

offline.py    runs the workloads of `workloads.py` in an engine in this process, and compares the times with `bounds.py`
kernels.py    measures single kernels, by `engine.kernels.bench`
lines.py      writes a result as a JSON line
"""

from server.bench.workloads import WORKLOADS, Work, build_workload, fixed, mixed, warm_up_of

__all__ = ["WORKLOADS", "Work", "build_workload", "fixed", "mixed", "warm_up_of"]
