"""CUDA graphs of whole steps: one launch instead of a few hundred. The backend's own forward is the plain twin.

    decodes       rows, positions --upload--> [ gather -> forward -> logits -> sample ] --> logits, tokens
    mixed step    the same of each token and each query ^                        |
                                 '---------- each row's latest token ------------'

The upload also has a random number for each row. All other inputs of a step are on the device: the rows' KV block tables
and latest tokens (`inputs.py`), and their sampling parameters (`sampling/cuda_sampler.py`). A graph is captured when a step
first needs its size, or before that by `capture_next` while the engine is idle, so that graphs do not delay the start. Padding
belongs to the scratch row, whose one block no request owns.

All graphs share one memory pool. This is safe since graphs run one after the other in one stream, and the next graph begins only
after the results of the previous one were used. The largest graph is captured early, so that later graphs fit into its memory.

Large mixed steps run without a graph: their kernels take longer than their launches.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from engine.backends.base import Backend
from engine.batch import ForwardBatch, LayerPools, pinned
from engine.device.graph_shapes import DecodeBuffers, GraphSizes, Key, MixedBuffers, Numbers, Packed
from engine.device.inputs import Ints, Rows, RowState, Slices
from engine.plan import StepPlan

Uniforms = Callable[[Ints, Ints], Numbers]
"""(rows [B], ends [B]) -> the random number for the token at the end of each row, [B]."""
Sample = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits [B, V], rows [B] int32, latest [R], uniform [B] float64) -> tokens [B] int64; also writes the tokens to `latest`."""


class GraphOutput(NamedTuple):
    """The output of a replayed graph for the B slices of a step."""

    logits: torch.Tensor  # [B, V]: the logits after each slice's last token; the caller may overwrite them
    tokens: torch.Tensor  # [B] int64: tokens sampled from the unadjusted logits, already set as the rows' latest tokens


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor  # int32: the device array that the host fills before a replay
    output: GraphOutput


class StepGraphs:
    """Captures the steps of one runner in CUDA graphs, one for each shape, and replays them."""

    def __init__(self, backend: Backend, kv: list[LayerPools], rows: Rows, sample: Sample, *, block_size: int) -> None:
        self._backend = backend
        self._kv = kv
        self._rows = rows
        self._sample_tokens = sample
        self._state: RowState = rows.state
        self._block_size = block_size
        self._device = self._state.latest.device
        # The padding tokens of a step form a query of the scratch row, whose block table holds no more tokens than this.
        max_tokens = min(backend.graph_tokens, self._state.tables.shape[1] * block_size)
        self._sizes = GraphSizes.of(self._state.scratch_row, max_tokens)
        self._captured: dict[Key, _Captured] = {}
        # All graphs share one logits buffer [max queries, V]. A buffer per graph would stay allocated for good.
        self._logits: torch.Tensor | None = None
        self._pool = torch.cuda.graph_pool_handle()
        # Imported by name, since this module must also import on machines without Triton.
        self._kernels = importlib.import_module("engine.kernels.gather_inputs")

    @property
    def keys(self) -> list[Key]:
        """List the shapes of all graphs that steps may need, the largest first."""
        keys = self._sizes.all_keys()
        largest = max(keys)
        return [largest, *(key for key in keys if key != largest)]

    def run(self, slices: Slices, uniforms: Uniforms, begins: Callable[[], None]) -> GraphOutput | None:
        """Run the step of `slices` in a CUDA graph. Returns None, and does nothing, if no graph fits the step.

        `uniforms` gives the random numbers, and `begins` is called right before the replay.
        """
        num = slices.rows.size
        if slices.first[-1] == num == slices.samples.size and self._rows.all_sampled(slices):
            key = self._sizes.decode(num)
            values = self._decode_buffers(key, slices.rows, slices.starts, uniforms(slices.rows, slices.ends)).values
        elif (fitting := self._sizes.mixed(int(slices.first[-1]), num)) is not None:
            key = fitting
            values = self._mixed_buffers(key, slices, uniforms(slices.rows, slices.ends)).values
        else:
            return None
        return self._replay(key, values, num, begins)

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
                self._capture_key(each)

    def _decode_buffers(self, key: Key, rows: Ints, positions: Ints, uniform: Numbers) -> DecodeBuffers:
        return DecodeBuffers.of(rows, positions, uniform, size=key[0], scratch_row=self._state.scratch_row)

    def _mixed_buffers(self, key: Key, slices: Slices, uniform: Numbers) -> MixedBuffers:
        return MixedBuffers.of(self._rows.mixed(slices), slices, uniform, key=key, scratch_row=self._state.scratch_row)

    def _replay(self, key: Key, values: Packed, num: int, begins: Callable[[], None]) -> GraphOutput:
        if key not in self._captured:
            self.capture(key)
        graph, inputs, output = self._captured[key]
        staging = pinned(values.size, torch.int32)
        staging.numpy()[:] = values
        inputs.copy_(staging, non_blocking=True)
        begins()
        graph.replay()
        return GraphOutput(output.logits[:num], output.tokens[:num])

    def _capture_key(self, key: Key) -> None:
        self._captured[key] = self._capture_mixed(key) if key[1] else self._capture_decode(key)

    def _capture_decode(self, key: Key) -> _Captured:
        size, no_rows = key[0], np.zeros(0, np.int64)
        packed = self._decode_buffers(key, no_rows, no_rows, np.zeros(0))
        inputs = torch.from_numpy(packed.values).to(self._device)
        starts = torch.arange(size + 1, dtype=torch.int32, device=self._device)

        def run() -> GraphOutput:
            uniform, rows, positions = (part[:size] for part in packed.parts(inputs))
            gathered = self._kernels.gather_decodes(rows, positions, self._state.latest, self._state.tables, self._block_size)
            ones = [1] * size
            batch = ForwardBatch(
                **gathered._asdict(), query_starts=starts, num_decodes=size, query_lens_host=ones, kv_lens_host=ones, kv=self._kv
            )
            return self._sample(self._backend.forward(batch), rows, uniform)

        return self._record(inputs, run)

    def _capture_mixed(self, key: Key) -> _Captured:
        packed = self._mixed_buffers(key, Slices.of(StepPlan(0)), np.zeros(0))
        inputs = torch.from_numpy(packed.values).to(self._device)
        ones = [1] * key[1]

        def run() -> GraphOutput:
            uniform, tokens, positions, owners, rows, kv_lens, starts = packed.parts(inputs)
            gathered = self._kernels.gather_mixed(
                tokens, positions, owners, rows, kv_lens, self._state.latest, self._state.tables, self._block_size
            )
            batch = ForwardBatch(
                **gathered._asdict(),
                query_starts=starts,
                num_decodes=0,
                query_lens_host=[],
                kv_lens_host=[],
                kv=self._kv,
                by_length=True,
            )
            read = batch.last_tokens(starts[1:].long() - 1, gathered.kv_lens, gathered.block_tables, ones)
            return self._sample(self._backend.forward(replace(batch, read=read)), rows, uniform)

        return self._record(inputs, run)

    def _sample(self, hidden: torch.Tensor, rows: torch.Tensor, uniform: torch.Tensor) -> GraphOutput:
        logits = self._backend.logits(hidden, None if self._logits is None else self._logits[: hidden.shape[0]])
        return GraphOutput(logits, self._sample_tokens(logits, rows, self._state.latest, uniform))

    def _record(self, inputs: torch.Tensor, run: Callable[[], GraphOutput]) -> _Captured:
        """Call `run` once, which compiles kernels and fills the libraries' caches, and then capture a second call in a graph.

        The inputs name only the scratch row, so no request's memory is written.
        """
        output = run()
        if self._logits is None:
            self._logits = output.logits.new_empty(self._sizes.queries[-1], output.logits.shape[1])
        graph = torch.cuda.CUDAGraph()
        # The capture is thread-local, since another thread of the program may use CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = run()
        return _Captured(graph, inputs, output)
