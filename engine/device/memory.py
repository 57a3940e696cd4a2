"""How much device memory steps need beside the KV cache: what is measured, and how the figures add up.

Steps run one after the other, so of the memory that a step frees again only the largest amount counts:

    steps          the largest of several kinds of steps without a graph (`trial_steps.py`)
    long context   what a chunk at the end of the longest context takes on top, for latents that are expanded to keys and values

Other memory stays taken: graphs, token counts of rows with penalties, loaded kernels and libraries, workspaces. Whatever of it
the trials took is missing from the free memory afterwards. The graphs that were not captured are estimated from those that were.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

Run = Callable[[], None]


class MemoryProbe(Protocol):
    def free(self) -> int:
        """Bytes that are free on the device, with nothing held back for later tensors."""
        ...

    def peak(self, run: Run) -> int:
        """Call `run` and return how many more bytes than afterwards were in use at most meanwhile."""
        ...


class Trials(NamedTuple):
    """What is run to measure the memory that serving needs."""

    steps: Sequence[Run]  # any of these may be the step that takes most
    long_context: Run | None  # its memory may come on top of any of `steps`
    captures: Sequence[Run]  # the first two capture the largest graphs, each other one captures a small graph
    num_graphs: int  # graphs that serving may capture, those of `captures` included


class Needs(NamedTuple):
    """Bytes of device memory that serving needs beside the KV cache and beside what is taken already."""

    step: int
    long_context: int
    graphs: int  # those that were not captured yet

    @property
    def total(self) -> int:
        return self.step + self.long_context + self.graphs


def measure(probe: MemoryProbe, trials: Trials) -> Needs:
    """Run `trials`. What they leave allocated is to be alive when the caller reads the free memory."""
    graphs = _other_graphs(probe, trials)
    step = max(probe.peak(run) for run in trials.steps)
    long_context = 0 if trials.long_context is None else probe.peak(trials.long_context)
    return Needs(step, long_context, graphs)


def _other_graphs(probe: MemoryProbe, trials: Trials) -> int:
    """Bytes that the graphs without a trial will take: each as much as a small one took on average, once the largest graphs had
    been captured. All graphs share one memory pool, so a further graph costs little more than the driver's copy of it."""
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
    """The MemoryProbe of the current CUDA device."""

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
