"""Replaces CUDA graphs on a CPU: a replay runs the captured step again and writes into the same outputs.

Triton's interpreter runs the kernels. Steps in graphs can thus be compared with plain steps without a GPU.
"""

from __future__ import annotations

import pytest
import torch

from engine.attention.triton_gqa import TritonGqa
from engine.attention.triton_mla import TritonMla
from engine.backends import torch as backend
from engine.device import graph_shapes, graphs, runner
from engine.kernels import sample_filtered
from engine.models import base
from engine.sampling.cuda_sampler import CudaSampler
from engine.sampling.sampler import Sampler


class Replay:
    """Replaces a torch.cuda.CUDAGraph. A replay runs the captured step again on the CPU."""

    def __init__(self, run, outputs):
        self._run = run
        self._outputs = outputs

    def replay(self):
        for output, new in zip(self._outputs, self._run(), strict=True):
            output.copy_(new)


class StandInGraphs(graphs.StepGraphs):
    at_start = 0  # graphs that are captured before the first step
    kinds: set[bool] = set()  # has True after a step of decodes alone ran in a graph, False after a mixed step

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for _ in range(self.at_start):
            self._capture(next(key for key in self._order if key not in self._captured))

    def _record(self, program):
        outputs = program.run()
        return graphs._Captured(Replay(program.run, outputs), program.inputs, outputs)

    def run(self, slices, *rest):
        output = super().run(slices, *rest)
        if output is not None:
            self.kinds.add(bool(slices.first[-1] == slices.samples.size))
        return output


class KernelSampler(Sampler):
    """A sampler that uses the Triton kernels on the CPU too, where Triton's interpreter runs them."""

    def __init__(self, *, max_rows, device, upload, **options):
        super().__init__(max_rows=max_rows, device=device, upload=upload, **options)
        self._cuda = CudaSampler(max_rows, device, upload)


def install(monkeypatch: pytest.MonkeyPatch) -> type[StandInGraphs]:
    """Make every runner that is built from now on use StandInGraphs instead of CUDA graphs, with few and small graphs."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(graphs, "pinned", lambda size, dtype: torch.empty(size, dtype=dtype))
    monkeypatch.setattr(graph_shapes, "TOKENS", (32, 48))
    monkeypatch.setattr(sample_filtered, "LOGITS_TILE", 128)
    monkeypatch.setattr(runner, "StepGraphs", StandInGraphs)
    monkeypatch.setattr(runner, "_use_graphs", lambda *_: True)
    monkeypatch.setattr(base, "can_group", lambda *_: True)
    monkeypatch.setattr(
        backend.select, "choose", lambda _, pools, __: TritonMla(2) if pools[0].name == "latent" else TritonGqa(2)
    )
    monkeypatch.setattr(StandInGraphs, "kinds", set())
    monkeypatch.setattr(runner, "Sampler", KernelSampler)
    # On CUDA, `to_host` copies the outputs before the next replay overwrites them. On a CPU it would copy nothing.
    monkeypatch.setattr(runner, "to_host", torch.clone)
    return StandInGraphs
