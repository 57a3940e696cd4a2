"""Measures the device memory that serving needs beside the KV cache. At start, trials run the largest steps and capture graphs.

A step frees its memory at its end, and steps run one after the other, so only the largest step counts:

    steps          the largest of several kinds of steps without a graph (`trial_steps.py`)
    long context   additional memory of a chunk at the end of the longest context, whose latents are expanded to keys and values

Other memory is never freed: graphs, token counts of rows with penalties, loaded kernels and libraries, workspaces. The trials
allocate all of this too, so the free memory after the trials does not include it. The trials capture only some graphs. The memory
of the other graphs is estimated from these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

Run = Callable[[], None]


class MemoryProbe(Protocol):
    def free(self) -> int:
        """Return the free bytes of the device, after torch has given back the memory that it keeps for later tensors."""
        ...

    def peak(self, run: Run) -> int:
        """Call `run`, and return the most bytes in use during the call minus the bytes in use after it."""
        ...


class Trials(NamedTuple):
    """The calls that are run to measure the memory that serving needs."""

    steps: Sequence[Run]  # steps, one of which takes the most memory of all steps
    long_context: Run | None  # a step at the end of the longest contexts; any of `steps` may need its memory in addition
    captures: Sequence[Run]  # the first two capture the largest graphs, and each other one a small graph
    num_graphs: int  # graphs that serving may capture, including those of `captures`


class Needs(NamedTuple):
    """Bytes of free device memory that the KV cache must leave to serving."""

    step: int  # bytes that the largest step needs
    long_context: int  # bytes that a step needs in addition for the longest context
    graphs: int  # bytes of all graphs that the trials did not capture

    @property
    def total(self) -> int:
        return self.step + self.long_context + self.graphs


def measure(probe: MemoryProbe, trials: Trials) -> Needs:
    """Run `trials`, and return the bytes that serving needs.

    The caller must read the free memory while all tensors and graphs that the trials left allocated are still alive.
    """
    graphs = _other_graphs(probe, trials)
    step = max(probe.peak(run) for run in trials.steps)
    long_context = 0 if trials.long_context is None else probe.peak(trials.long_context)
    return Needs(step, long_context, graphs)


def _other_graphs(probe: MemoryProbe, trials: Trials) -> int:
    """Capture the graphs of the trials, and estimate the bytes of all other graphs.

    All graphs share one memory pool. Once the largest graphs are captured, another graph needs little more than the driver's copy
    of the graph. Each graph is therefore estimated at the average of the small graphs.
    """
    for capture in trials.captures[:2]:
        capture()
    small = trials.captures[2:]
    if not small:
        return 0
    before = probe.free()
    for capture in small:
        capture()
    return max(0, before - probe.free()) * (trials.num_graphs - len(trials.captures)) // len(small)


class CudaMemory:
    """Measures the memory of the current CUDA device. Implements MemoryProbe."""

    def free(self) -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def peak(self, run: Run) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
