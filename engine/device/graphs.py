"""CUDA graphs of whole steps: one launch in place of a few hundred. The backend's own forward is the plain twin.

    decodes       rows, positions --upload--> [ gather -> forward -> logits -> choice ] --> logits, tokens
    mixed step    the same of each token and each query ^                        |
                                 '---------- each row's latest token ------------'

A random number for each row goes with them. All else that a step needs is on the device: the rows' block tables and latest
tokens (`inputs.py`), and how they choose (`sampling/draw_rows.py`). A graph is captured when a step first wants its size, or
before that by `capture_next` while there is nothing else to do, so none delays start-up. What only pads a batch is the scratch
row's, whose one block no request owns. All graphs share one memory pool: they run one after the other, and what one returns
is used up, in the same stream, before the next begins.

A large mixed step is left to the plain path: its kernels take longer than their launches.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from engine.backends.base import Backend
from engine.batch import ForwardBatch, LayerPools
from engine.device.graph_shapes import DecodeInputs, GraphSizes, Key, MixedInputs, Numbers, Packed
from engine.device.inputs import Ints, Rows, RowState, Slices
from engine.plan import StepPlan

Uniforms = Callable[[Ints, Ints], Numbers]
Choose = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits [B, V], rows [B] int32, latest [R], uniform [B] float64) -> tokens [B] int64, which it writes to `latest` too."""


class Decoded(NamedTuple):
    logits: torch.Tensor  # [B, V] after each query's last token; may be overwritten
    tokens: torch.Tensor  # [B] int64: chosen from the logits as they are; the rows' latest already


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor  # int32
    decoded: Decoded


class StepGraphs:
    def __init__(self, backend: Backend, kv: list[LayerPools], rows: Rows, choose: Choose, *, block_size: int) -> None:
        self._backend = backend
        self._kv = kv
        self._rows = rows
        self._choose_tokens = choose
        self._state: RowState = rows.state
        self._block_size = block_size
        self._device = self._state.latest.device
        # The tokens that pad are a query too, whose table holds so many.
        most_tokens = min(backend.graph_tokens, self._state.tables.shape[1] * block_size)
        self._sizes = GraphSizes.of(self._state.scratch_row, most_tokens)
        self._captured: dict[Key, _Captured] = {}
        self._logits: torch.Tensor | None = None  # [most queries, V], of all graphs: of its own, each would keep as much for ever
        self._pool = torch.cuda.graph_pool_handle()
        # Not at the top: what is imported there runs without Triton too.
        self._kernels = importlib.import_module("engine.kernels.step_inputs")

    def run(self, slices: Slices, uniforms: Uniforms, begins: Callable[[], None]) -> Decoded | None:
        """Run the step of `slices`; None, and nothing is done, where no graph does such a step.

        `uniforms` gives the random numbers of rows at their ends; `begins` is called right before the replay.
        """
        num = slices.rows.size
        if slices.first[-1] == num == slices.samples.size and self._rows.all_sampled(slices):
            key = self._sizes.decode(num)
            values = self._decode_inputs(key, slices.rows, slices.starts, uniforms(slices.rows, slices.ends)).values
        elif (fitting := self._sizes.mixed(int(slices.first[-1]), num)) is not None:
            key = fitting
            values = self._mixed_inputs(key, slices, uniforms(slices.rows, slices.ends)).values
        else:
            return None
        return self._replay(key, values, num, begins)

    def capture_next(self) -> bool:
        """Capture the smallest graph that is missing, those of decodes first. False: none is."""
        missing = next((key for key in self._sizes.all_keys() if key not in self._captured), None)
        if missing is not None:
            self._graph(missing)
        return missing is not None

    def _decode_inputs(self, key: Key, rows: Ints, positions: Ints, uniform: Numbers) -> DecodeInputs:
        return DecodeInputs.of(rows, positions, uniform, size=key[0], scratch_row=self._state.scratch_row)

    def _mixed_inputs(self, key: Key, slices: Slices, uniform: Numbers) -> MixedInputs:
        return MixedInputs.of(self._rows.mixed(slices), slices, uniform, key=key, scratch_row=self._state.scratch_row)

    def _replay(self, key: Key, values: Packed, num: int, begins: Callable[[], None]) -> Decoded:
        graph, inputs, decoded = self._graph(key)
        # From torch's cache of pinned memory, which keeps the buffer until the copy out of it is done.
        staging = torch.empty(values.size, dtype=torch.int32, pin_memory=True)
        staging.numpy()[:] = values
        inputs.copy_(staging, non_blocking=True)
        begins()
        graph.replay()
        return Decoded(decoded.logits[:num], decoded.tokens[:num])

    def _graph(self, key: Key) -> _Captured:
        if key not in self._captured:
            self._captured[key] = self._capture_mixed(key) if key[1] else self._capture_decode(key)
        return self._captured[key]

    def _capture_decode(self, key: Key) -> _Captured:
        size, no_rows = key[0], np.zeros(0, np.int64)
        packed = self._decode_inputs(key, no_rows, no_rows, np.zeros(0))
        inputs = torch.from_numpy(packed.values).to(self._device)
        starts = torch.arange(size + 1, dtype=torch.int32, device=self._device)

        def run() -> Decoded:
            uniform, rows, positions = (part[:size] for part in packed.parts(inputs))
            gathered = self._kernels.gather_decodes(rows, positions, self._state.latest, self._state.tables, self._block_size)
            ones = [1] * size
            batch = ForwardBatch(
                **gathered._asdict(), query_starts=starts, num_decodes=size, query_lens_host=ones, kv_lens_host=ones, kv=self._kv
            )
            return self._choose(self._backend.forward(batch), rows, uniform)

        return self._capture(inputs, run)

    def _capture_mixed(self, key: Key) -> _Captured:
        packed = self._mixed_inputs(key, Slices.of(StepPlan(0)), np.zeros(0))
        inputs = torch.from_numpy(packed.values).to(self._device)
        ones = [1] * key[1]

        def run() -> Decoded:
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
            return self._choose(self._backend.forward(replace(batch, read=read)), rows, uniform)

        return self._capture(inputs, run)

    def _choose(self, hidden: torch.Tensor, rows: torch.Tensor, uniform: torch.Tensor) -> Decoded:
        logits = self._backend.logits(hidden, None if self._logits is None else self._logits[: hidden.shape[0]])
        return Decoded(logits, self._choose_tokens(logits, rows, self._state.latest, uniform))

    def _capture(self, inputs: torch.Tensor, run: Callable[[], Decoded]) -> _Captured:
        decoded = run()  # compiles kernels and fills the libraries' caches, on the scratch row alone
        if self._logits is None:
            self._logits = decoded.logits.new_empty(self._sizes.queries[-1], decoded.logits.shape[1])
        graph = torch.cuda.CUDAGraph()
        # Another thread of the program may use CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            decoded = run()
        return _Captured(graph, inputs, decoded)
