"""The shapes that captured steps have, and how what the host tells such a step lies in one array of int32."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engine.device.inputs import Ints, Slices

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
LARGER = 64  # past the last of SIZES, rows between graphs
TOKENS = (32, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
QUERIES = (16, 64)  # and as many as there can be
ALIGN = 4  # numbers, 16 bytes: where parts of an array begin

Numbers = npt.NDArray[np.float64]
Packed = npt.NDArray[np.int32]
Key = tuple[int, int]
"""(tokens, queries) of a mixed step; (rows, 0) of decodes alone."""


class GraphSizes(NamedTuple):
    """What steps are rounded up to, ascending. Of mixed steps, one query is for the tokens that pad."""

    decodes: list[int]  # rows; the last holds all
    tokens: list[int]
    queries: list[int]

    @staticmethod
    def of(max_rows: int, most_tokens: int) -> GraphSizes:
        """`most_tokens` of a mixed step; 0: no mixed steps."""
        larger = range(SIZES[-1] + LARGER, max_rows + LARGER, LARGER)
        decodes = [size for size in (*SIZES, *larger) if size < max_rows]
        all_queries = -(-(max_rows + 1) // ALIGN) * ALIGN
        queries = [num for num in QUERIES if num <= max_rows]
        return GraphSizes([*decodes, max_rows], [num for num in TOKENS if num <= most_tokens], [*queries, all_queries])

    def decode(self, num_rows: int) -> Key:
        return self.decodes[bisect_left(self.decodes, num_rows)], 0

    def mixed(self, num_tokens: int, num_queries: int) -> Key | None:
        """None: the step is too large."""
        if not self.tokens or num_tokens > self.tokens[-1]:
            return None
        tokens = self.tokens[bisect_left(self.tokens, num_tokens)]
        return tokens, self.queries[bisect_left(self.queries, num_queries + 1)]

    def all_keys(self) -> list[Key]:
        """Of all graphs that steps may want, small ones first and decodes before the others."""
        fewest = [1, *self.queries]  # a step of more queries than a graph holds has as many tokens
        mixed = [(t, q) for t in self.tokens for q, least in zip(self.queries, fewest, strict=False) if t >= least]
        return [*((size, 0) for size in self.decodes), *mixed]


class DecodeInputs(NamedTuple):
    """What a captured step of decodes is told: uniform [B] float64 | rows, positions [B]. What only pads is the scratch row."""

    values: Packed
    stride: int  # B, and some to align

    @staticmethod
    def of(rows: Ints, positions: Ints, uniform: Numbers, *, size: int, scratch_row: int) -> DecodeInputs:
        num, stride = rows.size, max(size, ALIGN)
        inputs = DecodeInputs(np.zeros(4 * stride, np.int32), stride)
        numbers, all_rows, all_positions = inputs.parts(inputs.values)
        numbers[:num], all_positions[:num] = uniform, positions
        all_rows[:num], all_rows[num:] = rows, scratch_row
        return inputs

    def parts(self, values: Any) -> list[Any]:
        """uniform, rows, positions: views of this array, or of its like on a device; each of `stride`."""
        return _parts(values, self.stride, [self.stride] * 2)


class MixedInputs(NamedTuple):
    """What a captured step of chunks and decodes is told.

    uniform [B] float64 | tokens, positions, owners [T] | rows, kv_lens [B] | query_starts [B + 1]. The tokens that only pad
    are one more query, of the scratch row; the queries that only pad have no token.
    """

    values: Packed
    num_tokens: int  # T
    num_queries: int  # B

    @staticmethod
    def of(tokens: tuple[Ints, Ints, Ints], slices: Slices, uniform: Numbers, *, key: Key, scratch_row: int) -> MixedInputs:
        """`tokens` as `Rows.mixed` gives them, `uniform` one number a slice."""
        num_tokens, num_queries = key
        used, padding = tokens[0].size, num_tokens - tokens[0].size
        inputs = MixedInputs(np.zeros(3 * num_tokens + 5 * num_queries + 1, np.int32), num_tokens, num_queries)
        numbers, token_ids, positions, owners, rows, kv_lens, starts = inputs.parts(inputs.values)
        token_ids[:used], positions[:used], owners[:used] = tokens
        positions[used:], owners[used:] = np.arange(padding), scratch_row
        num = slices.rows.size
        numbers[:num] = uniform
        rows[:num], rows[num:] = slices.rows, scratch_row
        kv_lens[:num], kv_lens[num], kv_lens[num + 1 :] = slices.ends, max(1, padding), 1
        starts[: num + 1], starts[num + 1 :] = slices.first, num_tokens
        return inputs

    def parts(self, values: Any) -> list[Any]:
        """uniform, tokens, positions, owners, rows, kv_lens, query_starts: views of this array, or of its like on a device."""
        sizes = [self.num_tokens] * 3 + [self.num_queries] * 2 + [self.num_queries + 1]
        return _parts(values, self.num_queries, sizes)


def _parts(values: Any, num_floats: int, sizes: list[int]) -> list[Any]:
    """The leading float64 of an int32 array of numpy or torch, and then its parts of `sizes`."""
    floats = values[: 2 * num_floats].view(np.float64 if isinstance(values, np.ndarray) else torch.float64)
    ends = (2 * num_floats + np.cumsum(sizes)).tolist()
    return [floats, *(values[end - size : end] for end, size in zip(ends, sizes, strict=True))]
