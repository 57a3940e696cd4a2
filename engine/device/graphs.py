"""CUDA graphs of whole steps: one launch instead of a few hundred. The backend's own forward is the plain twin.

    decodes       rows, positions --upload--> [ gather -> forward -> logits -> sample ] --> logits, tokens
    mixed step    the same of each token and each query ^                        |
                                 '---------- each row's latest token ------------'

The upload also has a random number for each row. `step_programs.py` has what is captured. Graphs are captured one by one by
`capture_next`: before the engine is ready, and while it is idle. A step whose graph does not exist yet takes a larger one or runs
without a graph; only offline, where nobody waits for a single step, the step captures its graph first.

All graphs share one memory pool. This is safe since graphs run one after the other in one stream, and the next graph begins only
after the results of the previous one were used. The largest graph is captured early, so that later graphs fit into its memory.

Large mixed steps run without a graph: their kernels take longer than their launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from engine.batch import pinned
from engine.device.graph_shapes import Key, Numbers, Packed
from engine.device.inputs import Ints, Rows, Slices
from engine.device.step_programs import Program, StepOutput, StepPrograms

# A graph may stand in for a missing smaller one if it has at most this many tokens, or this many times as many.
MOST_PADDED = 64
MOST_PADDING = 2

Uniforms = Callable[[Ints, Ints], Numbers]
"""(rows [B], ends [B]) -> the random number for the token at the end of each row, [B]."""


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor  # int32: the device array that the host fills before a replay
    output: StepOutput


class StepGraphs:
    """Captures the programs of one runner in CUDA graphs, one for each shape, and replays them."""

    def __init__(self, programs: StepPrograms, rows: Rows, *, on_demand: bool) -> None:
        """With `on_demand`, a step whose graph does not exist captures it."""
        self._programs = programs
        self._on_demand = on_demand
        self._rows = rows
        self._sizes = programs.sizes
        self._captured: dict[Key, _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def keys(self) -> list[Key]:
        """List the shapes of all graphs that steps may need, the largest first."""
        keys = self._sizes.all_keys()
        largest = max(keys)
        return [largest, *(key for key in keys if key != largest)]

    def run(self, slices: Slices, uniforms: Uniforms, begins: Callable[[], None]) -> StepOutput | None:
        """Run the step of `slices` in a CUDA graph. Returns None, and does nothing, if no graph fits the step.

        `uniforms` gives the random numbers, and `begins` is called right before the replay.
        """
        num = slices.rows.size
        if slices.first[-1] == num == slices.samples.size and self._rows.all_sampled(slices):
            key = self._existing(self._sizes.decode(num))
        else:
            key = self._existing(self._sizes.mixed(int(slices.first[-1]), num))
        if key is None:
            return None
        numbers = uniforms(slices.rows, slices.ends)
        if key[1]:
            values = self._programs.mixed_buffers(key, slices, numbers).values
        else:
            values = self._programs.decode_buffers(key, slices.rows, slices.starts, numbers).values
        return self._replay(key, values, num, begins)

    def _existing(self, key: Key | None) -> Key | None:
        """Return `key` if its graph exists or may be captured now, else the key of the smallest existing graph that holds the
        step and is not much larger."""
        if key is None or key in self._captured or self._on_demand:
            return key
        most = max(MOST_PADDED, MOST_PADDING * key[0])
        larger = [k for k in self._captured if key[0] <= k[0] <= most and bool(k[1]) == bool(key[1]) and k[1] >= key[1]]
        return min(larger, default=None)

    @property
    def _order(self) -> list[Key]:
        """List the shapes in the order of capture: the smallest graph, the largest, and then the others.

        The largest graph gives the memory pool its size. The smallest comes before it, so that the two have separate buffers:
        when the smallest graph used memory inside the largest graph's buffers, a token of a single stream of a small model took
        0.6% longer.
        """
        largest, *others = self.keys
        smallest = min(self.keys)
        return list(dict.fromkeys((smallest, largest, *others)))

    def capture_next(self) -> bool:
        """Capture the next graph that is missing. Returns False if none is missing."""
        missing = next((key for key in self._order if key not in self._captured), None)
        if missing is not None:
            self.capture(missing)
        return missing is not None

    def capture(self, key: Key) -> None:
        """Capture the graph of shape `key`, one of `keys`, unless it is captured already.

        The first call also captures the smallest and the largest graph.
        """
        for each in (*self._order[:2], key):
            if each not in self._captured:
                self._capture(each)

    def _capture(self, key: Key) -> None:
        self._captured[key] = self._record(self._programs.make(key))

    def _replay(self, key: Key, values: Packed, num: int, begins: Callable[[], None]) -> StepOutput:
        if key not in self._captured:
            self.capture(key)
        graph, inputs, output = self._captured[key]
        staging = pinned(values.size, torch.int32)
        staging.numpy()[:] = values
        inputs.copy_(staging, non_blocking=True)
        begins()
        graph.replay()
        return StepOutput(output.logits[:num], output.tokens[:num])

    def _record(self, program: Program) -> _Captured:
        """Run `program` once, which loads kernels and fills the libraries' caches, and then capture a second run in a graph."""
        program.run()
        graph = torch.cuda.CUDAGraph()
        # The capture is thread-local, since another thread of the program may use CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = program.run()
        return _Captured(graph, program.inputs, output)
