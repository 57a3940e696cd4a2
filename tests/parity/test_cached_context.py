"""Tests attention of long chunks behind a long context, which merges the results over segments of the context.

The result is compared with plain attention over the whole context. Segments and padding are small here. The plain twin of cuDNN's
call computes each segment, since cuDNN does not take float32.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from engine.attention import cached_context, cudnn
from engine.attention.base import PagedGqa, PagedMla
from engine.attention.cached_context import LongChunks
from engine.attention.long_prompts import Prompts
from engine.attention.torch_gqa import TorchGqa
from engine.attention.torch_mla import TorchMla
from engine.attention.triton_gqa import TritonGqa
from engine.attention.triton_mla import TritonMla
from engine.kernels.merge_parts import Part, merge_parts, merge_parts_plain
from engine.layers.ops import write
from tests.parity.test_triton_attention import BLOCK, DEVICE, make_batch, random

# Each query is (tokens in the KV cache after the step, tokens of this step): a decode, and chunks behind 0 to 217 cached tokens.
QUERIES = [(40, 1), (9, 9), (21, 5), (64, 32), (90, 27), (129, 1 + 32), (250, 33)]
RANK, ROPE, NOPE, V_DIM = 32, 16, 24, 16
CUDNN = cudnn.attend_part


@pytest.fixture(autouse=True)
def small_segments(monkeypatch):
    monkeypatch.setattr(cached_context, "SEGMENTS", (128, 32, 16))
    monkeypatch.setattr(cached_context, "QUERY_STEP", 8)
    monkeypatch.setattr(cached_context, "CAUSAL_STEP", 8)
    monkeypatch.setattr(cached_context.cudnn, "attend_part", cudnn.attend_part_plain)


def all_behind_a_context(queries: list[tuple[int, int]]) -> LongChunks:
    """Make a LongChunks of every chunk that has at least one KV block of cached context, however short the chunk is."""
    starts = itertools.accumulate((num for _, num in queries), initial=0)
    chunks = [
        cached_context.CachedChunk(i, range(start, start + num), length - num)
        for i, (start, (length, num)) in enumerate(zip(starts, queries, strict=False))
        if num > 1 and length - num >= 16
    ]
    assert len(chunks) == 5
    return LongChunks(Prompts([], together=False), chunks)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (6, 1)])
def test_grouped_heads(heads, kv_heads):
    generator = torch.Generator().manual_seed(0)
    num_blocks = len(QUERIES) * max(-(-length // BLOCK) for length, _ in QUERIES)
    pools = {name: random(num_blocks, BLOCK, kv_heads, 32, generator=generator) for name in ("k", "v")}
    batch = make_batch(QUERIES, pools, generator)
    qkv = random(batch.num_tokens, heads + 2 * kv_heads, 32, generator=generator)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    write(pools["k"], k, batch.slots)
    write(pools["v"], v, batch.slots)

    def run(attention: PagedGqa, long: LongChunks | None = None) -> torch.Tensor:
        step = attention.prepare(batch)
        if long is not None:
            step._long = long
        return step.attend(q, k, v, pools, scale=0.2)

    torch.testing.assert_close(run(TritonGqa(132), all_behind_a_context(QUERIES)), run(TorchGqa()), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", [1, 4])
def test_latents(heads):
    generator = torch.Generator().manual_seed(0)
    num_blocks = len(QUERIES) * max(-(-length // BLOCK) for length, _ in QUERIES)
    pools = {"latent": random(num_blocks, BLOCK, RANK + ROPE, generator=generator)}
    batch = make_batch(QUERIES, pools, generator)
    q = random(batch.num_tokens, heads, NOPE + ROPE, generator=generator)
    records = random(batch.num_tokens, RANK + ROPE, generator=generator)
    kv_b = random(heads, NOPE + V_DIM, RANK, generator=generator) / RANK**0.5
    write(pools["latent"], records, batch.slots)

    def run(attention: PagedMla, long: LongChunks | None = None) -> torch.Tensor:
        step = attention.prepare(batch)
        if long is not None:
            step._long = long
        return step.attend(q, records, kv_b, pools, scale=0.2)

    torch.testing.assert_close(run(TritonMla(132), all_behind_a_context(QUERIES)), run(TorchMla()), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("whole", [16, 32, 48, 128, 128 + 96 + 16, 5 * 128 + 112])
def test_segments_cover_the_context_once(whole):
    segments = cached_context.cut(whole)
    assert [i for segment in segments for i in segment] == list(range(whole))
    assert {len(segment) for segment in segments} <= set(cached_context.SEGMENTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_equals_its_twin(dtype):
    generator, num, heads, dim = torch.Generator().manual_seed(0), 19, 3, 24
    a, b = (
        # cuDNN returns such tensors: they have rows of padding before and after, and a token's heads are not adjacent.
        Part(
            random(heads, num + 9, dim, generator=generator).to(dtype).transpose(0, 1)[shift : shift + num + 2],
            (20 * random(heads, num + 9, generator=generator))[:, shift : shift + num + 2],
        )
        for shift in (3, 0)
    )
    a = Part(a.out[:num], a.lse[:, :num])
    expected = merge_parts_plain(a, b)
    merged = merge_parts(a, b)
    assert merged.out.dtype == torch.float32
    torch.testing.assert_close(merged.out, expected.out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged.lse, expected.lse, atol=1e-5, rtol=1e-5)
    again = merge_parts(merged, b, out := torch.empty(num, heads, 2 * dim, dtype=dtype, device=DEVICE)[:, :, :dim])
    assert again.out is out
    torch.testing.assert_close(out, merge_parts_plain(expected, b).out.to(dtype), atol=1e-5, rtol=1e-2)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs cuDNN's attention")
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "v_dim"), [(16, 4, 128, 128), (8, 8, 192, 128)])
@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_equals_its_twin(heads, kv_heads, dim, v_dim, causal):
    generator = torch.Generator().manual_seed(0)
    keys = 1024 if causal else 2048
    q = random(1024, heads, dim, generator=generator).bfloat16()
    k, v = (random(keys, kv_heads, size, generator=generator).bfloat16() for size in (dim, v_dim))
    assert cudnn.takes(q.dtype, dim, v_dim)
    out, lse = CUDNN(q, k, v, 0.1, causal=causal)
    expected = cudnn.attend_part_plain(q, k, v, 0.1, causal=causal)
    assert (out.float() - expected.out.float()).norm() / expected.out.float().norm() < 1e-2
    torch.testing.assert_close(lse, expected.lse, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize(("max_tokens", "max_len"), [(64, 700), (24, 700), (64, 100), (12, 40), (7, 700), (64, 20)])
def test_the_warm_up_makes_every_plan_that_a_chunk_needs(monkeypatch, max_tokens, max_len):
    """Chunks of all lengths behind contexts of all lengths need no plan, (rows, keys, causal), that the warm-up did not make."""
    for name, value in (("MIN_CHUNK", 8), ("MAX_CHUNK", 40), ("MIN_CACHED", 16), ("MIN_PRODUCTS", 0), ("CAUSAL_STEP", 4)):
        monkeypatch.setattr(cached_context, name, value)
    plans: set[tuple[int, int, bool]] = set()

    def plan(q, k, v, scale, *, causal):
        plans.add((q.shape[0], k.shape[0], causal))
        return Part(q, torch.zeros(1, q.shape[0]))

    monkeypatch.setattr(cached_context.cudnn, "attend_part", plan)
    monkeypatch.setattr(cached_context, "merge_parts", lambda a, b, out: a)

    def run(num: int, cached: int) -> None:
        for piece in cached_context._divide(cached_context.CachedChunk(0, range(num), cached)):
            q = torch.zeros(len(piece.tokens), 1, 2)
            gather = lambda first, last: (torch.zeros(last - first, 1, 2),) * 2  # noqa: E731
            cached_context.attend(q, piece.cached, gather, 1.0, q)

    for chunk in cached_context.warmup_chunks(max_tokens, max_len, torch.bfloat16):
        assert chunk.num <= max_tokens
        assert sum(chunk) <= max_len
        run(*chunk)
    warm, plans = plans, set()
    for num in range(8, max_tokens + 1):
        for cached in range(16, max_len - num + 1, 3):
            run(num, cached)
    assert plans <= warm


def test_only_long_chunks_behind_a_long_context_are_chosen(monkeypatch):
    """cuDNN takes a chunk with enough tokens, enough context, and enough products of the two. A very long chunk is divided."""
    monkeypatch.setattr(cached_context, "MIN_CHUNK", 8)
    monkeypatch.setattr(cached_context, "MAX_CHUNK", 16)
    monkeypatch.setattr(cached_context, "MIN_CACHED", 16)
    chunk = cached_context.CachedChunk
    assert not cached_context._is_long(chunk(0, range(7), 100), 0)
    assert not cached_context._is_long(chunk(0, range(8), 15), 0)
    assert not cached_context._is_long(chunk(0, range(8), 16), 129)
    assert cached_context._is_long(chunk(0, range(8), 16), 128)
    pieces = cached_context._divide(chunk(3, range(5, 38), 20))  # 33 tokens, with rows padded to multiples of 8
    assert pieces == [chunk(3, range(5, 21), 20), chunk(3, range(21, 37), 36), chunk(3, range(37, 38), 52)]
    assert [len(piece.tokens) for piece in cached_context._divide(chunk(0, range(17), 20))] == [16, 1]
