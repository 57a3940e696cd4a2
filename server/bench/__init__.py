"""Implements `tidegate bench`, which measures how fast this machine is.

offline.py    runs the workloads of `workloads.py` in an engine in this process, and compares the times with `bounds.py`
kernels.py    measures single kernels, by `engine.kernels.bench`
cost.py       measures what steps of a model cost, and writes a cost file
plan.py       finds how many replicas a load needs: it searches the rate that one simulated replica keeps
simulate.py   runs the loads of `loads.py` in a Core on a simulated clock; `outcomes.py` sums up what became of the requests
lines.py      writes a result as a JSON line
"""

from server.bench.workloads import WORKLOADS, Work, build_workload, fixed, mixed, warm_up_of

__all__ = ["WORKLOADS", "Work", "build_workload", "fixed", "mixed", "warm_up_of"]
