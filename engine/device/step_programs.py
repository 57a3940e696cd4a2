"""A step as a program over fixed device arrays: inputs -> [ gather -> forward -> logits -> sample ] -> logits, tokens.

A program has a fixed shape, so a CUDA graph can hold it (`graphs.py`). The host writes a few numbers of each row into the
program's input array. All other inputs of a step are on the device: the rows' KV block tables and latest tokens (`inputs.py`),
and their sampling parameters (`sampling/cuda_sampler.py`). Padding belongs to the scratch row, whose one block no request owns.
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
from engine.device.graph_shapes import DecodeBuffers, GraphSizes, Key, MixedBuffers, Numbers
from engine.device.inputs import Ints, Rows, RowState, Slices
from engine.plan import StepPlan

Sample = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits [B, V], rows [B] int32, latest [R], uniform [B] float64) -> tokens [B] int64; also writes the tokens to `latest`."""


class StepOutput(NamedTuple):
    """The output of a program for the B slices of a step."""

    logits: torch.Tensor  # [B, V]: the logits after each slice's last token; the caller may overwrite them
    tokens: torch.Tensor  # [B] int64: tokens sampled from the unadjusted logits, already set as the rows' latest tokens


class Program(NamedTuple):
    """A step of one shape. `run` computes it from `inputs`."""

    inputs: torch.Tensor  # int32, on the device: the host fills it before the step
    run: Callable[[], StepOutput]


class StepPrograms:
    """Makes the programs of one runner, one for each shape."""

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
        self.sizes = GraphSizes.of(self._state.scratch_row, max_tokens)
        # All programs share one logits buffer [max queries, V]. A buffer for each would stay allocated for good.
        self._logits: torch.Tensor | None = None
        # Imported by name, since this module must also import on machines without Triton.
        self._kernels = importlib.import_module("engine.kernels.gather_inputs")

    def make(self, key: Key) -> Program:
        """Make the program of shape `key`. Its inputs name only the scratch row, so running it writes no request's memory."""
        return self._mixed(key) if key[1] else self._decodes(key)

    def decode_buffers(self, key: Key, rows: Ints, positions: Ints, uniform: Numbers) -> DecodeBuffers:
        """Pack the inputs of a step of decodes for the program of shape `key`."""
        return DecodeBuffers.of(rows, positions, uniform, size=key[0], scratch_row=self._state.scratch_row)

    def mixed_buffers(self, key: Key, slices: Slices, uniform: Numbers) -> MixedBuffers:
        """Pack the inputs of a mixed step for the program of shape `key`."""
        return MixedBuffers.of(self._rows.mixed(slices), slices, uniform, key=key, scratch_row=self._state.scratch_row)

    def _decodes(self, key: Key) -> Program:
        size, no_rows = key[0], np.zeros(0, np.int64)
        packed = self.decode_buffers(key, no_rows, no_rows, np.zeros(0))
        inputs = torch.from_numpy(packed.values).to(self._device)
        starts = torch.arange(size + 1, dtype=torch.int32, device=self._device)

        def run() -> StepOutput:
            uniform, rows, positions = (part[:size] for part in packed.parts(inputs))
            gathered = self._kernels.gather_decodes(rows, positions, self._state.latest, self._state.tables, self._block_size)
            ones = [1] * size
            batch = ForwardBatch(
                **gathered._asdict(), query_starts=starts, num_decodes=size, query_lens_host=ones, kv_lens_host=ones, kv=self._kv
            )
            return self._sample(self._backend.forward(batch), rows, uniform)

        return Program(inputs, run)

    def _mixed(self, key: Key) -> Program:
        packed = self.mixed_buffers(key, Slices.of(StepPlan(0)), np.zeros(0))
        inputs = torch.from_numpy(packed.values).to(self._device)
        ones = [1] * key[1]

        def run() -> StepOutput:
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

        return Program(inputs, run)

    def _sample(self, hidden: torch.Tensor, rows: torch.Tensor, uniform: torch.Tensor) -> StepOutput:
        logits = self._backend.logits(hidden, None if self._logits is None else self._logits[: hidden.shape[0]])
        if self._logits is None:
            self._logits = logits.new_empty(self.sizes.queries[-1], logits.shape[1])
        return StepOutput(logits, self._sample_tokens(logits, rows, self._state.latest, uniform))
