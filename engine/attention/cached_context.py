"""Attention of a long prefill chunk over its cached context, by cuDNN.

A chunk of n tokens behind `cached` tokens attends to all cached tokens, and causally to itself. cuDNN has a fast kernel for each,
but none for both at once: it runs at 267 TFLOP/s with a mask that is aligned to the lower right, and at 685 without a mask. So
this module divides the keys:

    keys      0 ............................ whole | rest | chunk
              segments of 32,768, 8,192, 2,048     |
    kernel    no mask, one call a segment          | causal over rest + chunk, with `rest` dummy rows before the chunk

The results are merged by their log-sum-exps. Segments have few lengths, since cuDNN plans a kernel for each length. The dummy
rows cost at most rest^2 / 2 products of a query and a key, and rest is below 2,048.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from engine.attention import cudnn, long_prompts
from engine.attention.long_prompts import Prompts
from engine.attention.plans import Plan, Plans
from engine.batch import ForwardBatch, WarmupChunk
from engine.kernels.hardware import is_gpu
from engine.kernels.merge_parts import Part, merge_parts

SEGMENTS = (32768, 8192, 2048)  # sizes of a segment, in keys; each size is a multiple of the next
QUERY_STEP = 1024  # the query rows of a segment's call are padded to a multiple of this
CAUSAL_STEP = 512  # the rows of the causal call are padded to a multiple of this
MIN_CHUNK = 1024  # tokens; shorter chunks go to our Triton kernel, which computes all of a step's in one launch
MAX_CHUNK = 8192  # tokens; a longer chunk is divided, which is faster and leaves fewer lengths to plan
MIN_CACHED = 2048  # tokens; a shorter cached context is not worth a call of its own
# Fewest products of a query token and a cached token for which cuDNN is used. With fewer, the calls cost more than they save
# (docs/gpu.md). Our kernel for MLA is faster than that for GQA, since MLA has as many heads of keys as of queries.
MIN_PRODUCTS = 1 << 24
MIN_PRODUCTS_MLA = 1 << 26

Gather = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
"""Keys [S, kv_heads, dim] and values [S, kv_heads, v_dim] of a sequence's positions [first, last), S = last - first."""


class CachedChunk(NamedTuple):
    """A long prefill chunk of a step, with a long cached context before it."""

    query: int  # the chunk's index among the queries of the batch
    tokens: range  # the chunk's tokens, as indices among the step's tokens
    cached: int  # number of cached tokens before the chunk


class LongChunks(NamedTuple):
    """The chunks of a step from which cuDNN attends."""

    prompts: Prompts  # whole prompts; `long_prompts.py` attends from these
    cached: list[CachedChunk]

    @property
    def tokens(self) -> list[range]:
        return [*self.prompts.tokens, *(chunk.tokens for chunk in self.cached)]


def find_long(batch: ForwardBatch, dtype: torch.dtype, dim: int, v_dim: int, plans: Plans) -> LongChunks:
    """Find the chunks of a step from which cuDNN attends, for query heads [dim] and value heads [v_dim] of this type."""
    return LongChunks(long_prompts.find_prompts(batch, dtype, plans), find(batch, dtype, dim, v_dim, plans))


def warmup_chunks(max_tokens: int, max_len: int, dtype: torch.dtype) -> list[WarmupChunk]:
    """List warm-up chunks that together need every cuDNN plan for chunks of `max_tokens` and contexts of `max_len` tokens at
    most.

    The candidates are chunks of each padded length, behind one segment of each size at once or behind a single segment, with each
    padded rest. A candidate is listed if it needs a plan that no earlier candidate needs.
    """
    if dtype not in cudnn.DTYPES:
        return []
    longest = min(max_tokens, MAX_CHUNK)
    rows = [min(num, longest) for num in range(MIN_CHUNK, longest + QUERY_STEP, QUERY_STEP) if longest >= MIN_CHUNK]
    rests = [min(rest, SEGMENTS[-1] - 1) for rest in range(0, SEGMENTS[-1] + CAUSAL_STEP, CAUSAL_STEP)]
    contexts = [whole + rest for whole in (sum(SEGMENTS), *SEGMENTS) for rest in rests]
    planned: set[Plan] = set()
    chunks = []
    for num, cached in itertools.product(rows, contexts):
        plans = _plans(num, cached)
        if num + cached <= max_len and num * cached >= MIN_PRODUCTS and not plans <= planned:
            planned |= plans
            chunks.append(WarmupChunk(num, cached))
    return chunks


def _plans(num: int, cached: int) -> set[Plan]:
    """List the cuDNN plans that `attend` needs for a chunk of `num` tokens behind `cached` tokens."""
    whole = cached - cached % SEGMENTS[-1]
    rows, causal = _padded(num, QUERY_STEP), _padded(num + cached - whole, CAUSAL_STEP)
    return {Plan(causal, causal, True), *(Plan(rows, len(segment), False) for segment in cut(whole))}


def _padded(num: int, step: int) -> int:
    return num + -num % step


def find(batch: ForwardBatch, dtype: torch.dtype, dim: int, v_dim: int, plans: Plans) -> list[CachedChunk]:
    """Find the step's long chunks with a long cached context for which cuDNN has plans or may make them.

    The list is empty on a CPU and where cuDNN has no kernel. A chunk that is divided has all its pieces in the list, or none.
    """
    block_size = next(iter(batch.kv[0].values())).shape[1]
    if not (is_gpu(batch.slots.device) and cudnn.takes(dtype, dim, v_dim)) or SEGMENTS[-1] % block_size:
        return []
    ends = itertools.accumulate(batch.query_lens_host)
    lens = zip(ends, batch.query_lens_host, batch.kv_lens_host, strict=True)
    chunks = [CachedChunk(i, range(end - num, end), length - num) for i, (end, num, length) in enumerate(lens)]
    least = MIN_PRODUCTS if dim == v_dim else MIN_PRODUCTS_MLA
    divided = [_divide(chunk) for chunk in chunks if _is_long(chunk, least)]
    return [piece for pieces in divided if plans.take(_plans_of(pieces)) for piece in pieces]


def _plans_of(pieces: list[CachedChunk]) -> set[Plan]:
    return set().union(*(_plans(len(piece.tokens), piece.cached) for piece in pieces))


def _is_long(chunk: CachedChunk, least_products: int) -> bool:
    num = len(chunk.tokens)
    return num >= MIN_CHUNK and chunk.cached >= MIN_CACHED and num * chunk.cached >= least_products


def _divide(chunk: CachedChunk) -> list[CachedChunk]:
    """Divide `chunk` into pieces of similar length, of at most MAX_CHUNK tokens.

    A piece's context includes the earlier pieces, whose KV is in the pool already.
    """
    num = len(chunk.tokens)
    size = _padded(-(-num // -(-num // MAX_CHUNK)), QUERY_STEP)
    return [CachedChunk(chunk.query, chunk.tokens[start : start + size], chunk.cached + start) for start in range(0, num, size)]


def attend(q: torch.Tensor, cached: int, gather: Gather, scale: float, out: torch.Tensor) -> None:
    """Attend from the chunk q [n, heads, dim] at positions cached .. cached + n - 1, and write into `out` [n, heads, v_dim].

    `gather` reads the sequence's keys and values from the KV pool, which holds the chunk's own too. One segment is gathered at a
    time, so memory does not grow with the context.
    """
    whole = cached - cached % SEGMENTS[-1]
    total = _causal(q, cached - whole, gather(whole, cached + q.shape[0]), scale)
    padded = _pad(q, 0, _padded(q.shape[0], QUERY_STEP) - q.shape[0])
    segments = cut(whole)
    for segment in segments:
        part = cudnn.attend_part(padded, *gather(segment.start, segment.stop), scale, causal=False)
        last = segment is segments[-1]
        total = merge_parts(total, part, out if last else None)


def cut(whole: int) -> list[range]:
    """Cut positions [0, whole) into segments. `whole` is a positive multiple of the smallest segment."""
    segments, start = [], 0
    for size in SEGMENTS:
        while whole - start >= size:
            segments.append(range(start, start + size))
            start += size
    return segments


def _causal(q: torch.Tensor, rest: int, keys_values: tuple[torch.Tensor, torch.Tensor], scale: float) -> Part:
    """Attend from the chunk q to itself and to the `rest` keys before it, in one causal call.

    `rest` dummy query rows before the chunk make the call causal. The causal mask hides the padding at the end from all rows. The
    padding is zero, so that 0 * padding is 0.
    """
    num = q.shape[0]
    padding = -(rest + num) % CAUSAL_STEP
    queries = _pad(q, rest, padding)
    keys, values = (_pad(x, 0, padding) for x in keys_values)
    part = cudnn.attend_part(queries, keys, values, scale, causal=True)
    return Part(part.out[rest : rest + num], part.lse[:, rest : rest + num])


def _pad(x: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """Pad x [T, heads, dim] with zeros at both ends. The result is contiguous in any case, since cuDNN plans for strides too."""
    return F.pad(x, (0, 0, 0, 0, before, after)) if before or after else x.contiguous()
