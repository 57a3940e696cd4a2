"""The shapes of steps captured in CUDA graphs, and the layout of the int32 array that the host uploads before such a step."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engine.device.inputs import Ints, Slices

# Numbers of rows of a graph of decodes. Larger sizes follow at intervals of LARGER rows.
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
LARGER = 64
# Numbers of tokens and of queries of a graph of a mixed step. A number of queries that holds all rows is added to QUERIES.
TOKENS = (32, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
QUERIES = (16, 64)
ALIGN = 4  # int32 numbers, which are 16 bytes: every part of an uploaded array begins on a multiple

Numbers = npt.NDArray[np.float64]
Packed = npt.NDArray[np.int32]
Key = tuple[int, int]
"""The shape of a captured step: (tokens, queries) of a mixed step, or (rows, 0) of a step of decodes alone."""


class GraphSizes(NamedTuple):
    """The sizes that captured steps are rounded up to, each list ascending.

    A mixed step has one query more than its slices, for its padding tokens.
    """

    decodes: list[int]  # numbers of rows; the last one is the number of all rows
    tokens: list[int]
    queries: list[int]

    @staticmethod
    def of(max_rows: int, max_tokens: int) -> GraphSizes:
        """`max_tokens` is the largest mixed step that may be captured, in tokens; 0 if mixed steps cannot be captured."""
        larger = range(SIZES[-1] + LARGER, max_rows + LARGER, LARGER)
        decodes = [size for size in (*SIZES, *larger) if size < max_rows]
        all_queries = -(-(max_rows + 1) // ALIGN) * ALIGN
        queries = [num for num in QUERIES if num <= max_rows]
        return GraphSizes([*decodes, max_rows], [num for num in TOKENS if num <= max_tokens], [*queries, all_queries])

    def decode(self, num_rows: int) -> Key:
        """Return the shape of the smallest graph for a step of `num_rows` decodes."""
        return self.decodes[bisect_left(self.decodes, num_rows)], 0

    def mixed(self, num_tokens: int, num_queries: int) -> Key | None:
        """Return the shape of the smallest graph for a mixed step, or None if the step is too large for a graph."""
        if not self.tokens or num_tokens > self.tokens[-1]:
            return None
        tokens = self.tokens[bisect_left(self.tokens, num_tokens)]
        return tokens, self.queries[bisect_left(self.queries, num_queries + 1)]

    def all_keys(self) -> list[Key]:
        """List every shape that a step may need: first decodes, then mixed steps, each from small to large."""
        fewest = [1, *self.queries]  # fewest tokens for each number of queries: a step has at least as many tokens as queries
        mixed = [(t, q) for t in self.tokens for q, least in zip(self.queries, fewest, strict=False) if t >= least]
        return [*((size, 0) for size in self.decodes), *mixed]


class DecodeBuffers(NamedTuple):
    """The int32 array that is uploaded for a captured step of B decodes: uniform [B] float64 | rows, positions [B].

    Padding uses the scratch row.
    """

    values: Packed
    stride: int  # size of each part: B, but at least ALIGN

    @staticmethod
    def of(rows: Ints, positions: Ints, uniform: Numbers, *, size: int, scratch_row: int) -> DecodeBuffers:
        num, stride = rows.size, max(size, ALIGN)
        buffers = DecodeBuffers(np.zeros(4 * stride, np.int32), stride)
        numbers, all_rows, all_positions = buffers.parts(buffers.values)
        numbers[:num], all_positions[:num] = uniform, positions
        all_rows[:num], all_rows[num:] = rows, scratch_row
        return buffers

    def parts(self, values: Any) -> list[Any]:
        """Split `values`, on the host or on the device, into views: uniform, rows and positions, each [stride]."""
        return _parts(values, self.stride, [self.stride] * 2)


class MixedBuffers(NamedTuple):
    """The int32 array that is uploaded for a captured mixed step of chunks and decodes.

    Its layout is uniform [B] float64 | tokens, positions, owners [T] | rows, kv_lens [B] | query_starts [B + 1]. The padding
    tokens form one more query, of the scratch row. The padding queries have no tokens.
    """

    values: Packed
    num_tokens: int  # T, padding included
    num_queries: int  # B, padding included

    @staticmethod
    def of(tokens: tuple[Ints, Ints, Ints], slices: Slices, uniform: Numbers, *, key: Key, scratch_row: int) -> MixedBuffers:
        """Pack the inputs of a mixed step. `tokens` is the result of `Rows.mixed`, and `uniform` has one number per slice."""
        num_tokens, num_queries = key
        used, padding = tokens[0].size, num_tokens - tokens[0].size
        buffers = MixedBuffers(np.zeros(3 * num_tokens + 5 * num_queries + 1, np.int32), num_tokens, num_queries)
        numbers, token_ids, positions, owners, rows, kv_lens, starts = buffers.parts(buffers.values)
        token_ids[:used], positions[:used], owners[:used] = tokens
        positions[used:], owners[used:] = np.arange(padding), scratch_row
        num = slices.rows.size
        numbers[:num] = uniform
        rows[:num], rows[num:] = slices.rows, scratch_row
        kv_lens[:num], kv_lens[num], kv_lens[num + 1 :] = slices.ends, max(1, padding), 1
        starts[: num + 1], starts[num + 1 :] = slices.first, num_tokens
        return buffers

    def parts(self, values: Any) -> list[Any]:
        """Split `values`, the packed inputs of a mixed step on the host or on the device, into views.

        The views are, in order: each query's uniform random number, each token's id, position and batch row, and each query's
        batch row, KV length and first token.
        """
        sizes = [self.num_tokens] * 3 + [self.num_queries] * 2 + [self.num_queries + 1]
        return _parts(values, self.num_queries, sizes)


def _parts(values: Any, num_floats: int, sizes: list[int]) -> list[Any]:
    """Cut an int32 array of numpy or torch into views: `num_floats` leading float64, and then int32 parts of `sizes`."""
    floats = values[: 2 * num_floats].view(np.float64 if isinstance(values, np.ndarray) else torch.float64)
    ends = (2 * num_floats + np.cumsum(sizes)).tolist()
    return [floats, *(values[end - size : end] for end, size in zip(ends, sizes, strict=True))]
