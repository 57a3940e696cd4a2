"""`tidegate bench`: how fast this machine is.

offline.py    an engine in this process, over `workloads.py`, against `bounds.py`
kernels.py    each of our kernels by itself; `engine.kernels.bench` measures them
lines.py      a result as a JSON line
"""

from server.bench.workloads import WORKLOADS, Work, build_workload, fixed, mixed, warm_up_of

__all__ = ["WORKLOADS", "Work", "build_workload", "fixed", "mixed", "warm_up_of"]
