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
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engine.backends.base import Backend
from engine.batch import ForwardBatch, LayerPools
from engine.inputs import Ints, MixedInputs, Rows, RowState, Slices
from engine.plan import StepPlan

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
LARGER = 64  # past the last of SIZES, rows between graphs
TOKENS = (32, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
QUERIES = (16, 64)  # and as many as there can be
ALIGN = 4  # numbers: 16 bytes

Numbers = npt.NDArray[np.float64]
Choose = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits [B, V], rows [B] int32, latest [R], uniform [B] float64) -> tokens [B] int64, which it writes to `latest` too."""
Key = tuple[int, int]
"""(tokens, queries) of a mixed step; (rows, 0) of decodes alone."""


class Decoded(NamedTuple):
    logits: torch.Tensor  # [B, V] after each query's last token; may be overwritten
    tokens: torch.Tensor  # [B] int64: chosen from the logits as they are; the rows' latest already


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor  # int32
    decoded: Decoded


def graph_sizes(max_rows: int) -> list[int]:
    """Sizes of decodes to capture, ascending; the last holds `max_rows`."""
    larger = range(SIZES[-1] + LARGER, max_rows + LARGER, LARGER)
    sizes = [size for size in (*SIZES, *larger) if size < max_rows]
    return [*sizes, max_rows]


class StepGraphs:
    def __init__(self, backend: Backend, kv: list[LayerPools], rows: Rows, choose: Choose, *, block_size: int) -> None:
        self._backend = backend
        self._kv = kv
        self._rows = rows
        self._choose_tokens = choose
        self._state: RowState = rows.state
        self._block_size = block_size
        self._device = self._state.latest.device
        max_rows = self._state.scratch_row
        self._sizes = graph_sizes(max_rows)
        # The tokens that pad are a query too, whose table holds so many.
        most = min(backend.graph_tokens, self._state.tables.shape[1] * block_size)
        self._tokens = [num for num in TOKENS if num <= most]
        self._queries = [*(num for num in QUERIES if num <= max_rows), -(-(max_rows + 1) // ALIGN) * ALIGN]
        fewest = [1, *self._queries]  # a step of more queries than a graph holds has as many tokens
        mixed = [(t, q) for t in self._tokens for q, least in zip(self._queries, fewest, strict=False) if t >= least]
        self._keys: list[Key] = [*((size, 0) for size in self._sizes), *mixed]
        self._captured: dict[Key, _Captured] = {}
        self._logits: torch.Tensor | None = None  # [most queries, V], of all graphs: of its own, each would keep as much for ever
        self._pool = torch.cuda.graph_pool_handle()
        # Not at the top: what is imported there runs without Triton too.
        self._kernels = importlib.import_module("engine.kernels.step_inputs")

    def run(self, slices: Slices, uniform: Numbers, begins: Callable[[], None]) -> Decoded | None:
        """Run the step of `slices` with a random number for each; None, and nothing is done, where no graph does such a step.

        `begins` is called right before the replay.
        """
        num = slices.rows.size
        if slices.first[-1] == num == slices.samples.size and self._rows.all_sampled(slices):
            return self._decode(slices.rows, slices.starts, uniform, begins)
        if not self._tokens or slices.first[-1] > self._tokens[-1]:
            return None
        return self._mixed(slices, uniform, begins)

    def capture_next(self) -> bool:
        """Capture the smallest graph that is missing, those of decodes first. False: none is."""
        missing = next((key for key in self._keys if key not in self._captured), None)
        if missing is not None:
            self._graph(missing)
        return missing is not None

    def _decode(self, rows: Ints, positions: Ints, uniform: Numbers, begins: Callable[[], None]) -> Decoded:
        """A decode of `rows` [B], whose latest tokens stand at `positions` [B]."""
        num = rows.size
        size = self._sizes[bisect_left(self._sizes, num)]
        graph, inputs, decoded = self._graph((size, 0))
        # From torch's cache of pinned memory, which keeps the buffer until the copy out of it is done.
        staging = torch.empty(inputs.shape, dtype=torch.int32, pin_memory=True)
        values = staging.numpy()
        values[0, :num], values[0, num:] = rows, self._state.scratch_row
        values[1, :num], values[1, num:] = positions, 0
        values[2:].reshape(-1).view(np.float64)[:num] = uniform
        inputs.copy_(staging, non_blocking=True)
        begins()
        graph.replay()
        return Decoded(decoded.logits[:num], decoded.tokens[:num])

    def _mixed(self, slices: Slices, uniform: Numbers, begins: Callable[[], None]) -> Decoded:
        num = slices.rows.size
        tokens = self._tokens[bisect_left(self._tokens, int(slices.first[-1]))]
        queries = self._queries[bisect_left(self._queries, num + 1)]  # one more for the tokens that pad
        graph, inputs, decoded = self._graph((tokens, queries))
        scratch = self._state.scratch_row
        packed = MixedInputs.of(
            self._rows.mixed(slices), slices, uniform, num_tokens=tokens, num_queries=queries, scratch_row=scratch
        )
        staging = torch.empty(packed.values.size, dtype=torch.int32, pin_memory=True)
        staging.numpy()[:] = packed.values
        inputs.copy_(staging, non_blocking=True)
        begins()
        graph.replay()
        return Decoded(decoded.logits[:num], decoded.tokens[:num])

    def _graph(self, key: Key) -> _Captured:
        if key not in self._captured:
            num, queries = key
            self._captured[key] = self._capture_mixed(num, queries) if queries else self._capture_decode(num)
        return self._captured[key]

    def _capture_decode(self, size: int) -> _Captured:
        inputs = torch.zeros(4, max(size, ALIGN), dtype=torch.int32, device=self._device)  # the last two are float64
        inputs[0].fill_(self._state.scratch_row)
        starts = torch.arange(size + 1, dtype=torch.int32, device=self._device)

        def run() -> Decoded:
            rows, positions, uniform = inputs[0, :size], inputs[1, :size], inputs[2:].flatten().view(torch.float64)
            gathered = self._kernels.gather_decodes(rows, positions, self._state.latest, self._state.tables, self._block_size)
            ones = [1] * size
            batch = ForwardBatch(
                **gathered._asdict(), query_starts=starts, num_decodes=size, query_lens_host=ones, kv_lens_host=ones, kv=self._kv
            )
            return self._choose(self._backend.forward(batch), rows, uniform)

        return self._capture(inputs, run)

    def _capture_mixed(self, num_tokens: int, num_queries: int) -> _Captured:
        none = Slices.of(StepPlan(0, [], [], [], 0, [], [], [], []))
        scratch = self._state.scratch_row
        packed = MixedInputs.of(
            self._rows.mixed(none), none, np.zeros(0), num_tokens=num_tokens, num_queries=num_queries, scratch_row=scratch
        )
        inputs = torch.from_numpy(packed.values).to(self._device)

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
            last = starts[1:].long() - 1
            return self._choose(self._backend.forward(batch).index_select(0, last), rows, uniform)

        return self._capture(inputs, run)

    def _choose(self, hidden: torch.Tensor, rows: torch.Tensor, uniform: torch.Tensor) -> Decoded:
        logits = self._backend.logits(hidden, None if self._logits is None else self._logits[: hidden.shape[0]])
        return Decoded(logits, self._choose_tokens(logits, rows, self._state.latest, uniform))

    def _capture(self, inputs: torch.Tensor, run: Callable[[], Decoded]) -> _Captured:
        decoded = run()  # compiles kernels and fills the libraries' caches, on the scratch row alone
        if self._logits is None:
            self._logits = decoded.logits.new_empty(self._queries[-1], decoded.logits.shape[1])
        graph = torch.cuda.CUDAGraph()
        # Another thread of the program may use CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            decoded = run()
        return _Captured(graph, inputs, decoded)
