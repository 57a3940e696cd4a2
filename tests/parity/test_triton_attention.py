"""Tests grouped-query attention by Triton against its plain twin `attention/torch_gqa.py`, over the same KV pools."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from engine.attention import long_prompts
from engine.attention.base import PagedGqa
from engine.attention.cached_context import LongChunks
from engine.attention.long_prompts import Prompts
from engine.attention.torch_gqa import TorchGqa
from engine.attention.triton_gqa import TritonGqa
from engine.batch import ForwardBatch, LayerPools
from engine.kernels import paged_prefill, tile_parts
from engine.kernels.paged_decode import choose_splits, paged_decode
from engine.layers.ops import write

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK = 16
# Each query is (tokens in the KV cache after the step, tokens of this step): three decodes, a prompt, and two chunks behind
# cached prefixes.
MIXED = [(1, 1), (33, 1), (100, 1), (20, 20), (70, 37), (64, 3)]
DECODES = MIXED[:3]
CHUNKS = MIXED[3:]


def make_batch(queries: list[tuple[int, int]], pools: LayerPools, generator: torch.Generator) -> ForwardBatch:
    width = max(-(-length // BLOCK) for length, _ in queries)
    tables = torch.randperm(len(queries) * width, generator=generator).view(len(queries), width)
    positions = [p for length, num in queries for p in range(length - num, length)]
    owners = [i for i, (_, num) in enumerate(queries) for _ in range(num)]
    slots = [int(tables[i, p // BLOCK]) * BLOCK + p % BLOCK for i, p in zip(owners, positions, strict=True)]
    return ForwardBatch(
        token_ids=torch.zeros(len(positions), dtype=torch.int64, device=DEVICE),
        positions=torch.tensor(positions, device=DEVICE),
        slots=torch.tensor(slots, device=DEVICE),
        query_starts=torch.tensor([0, *itertools.accumulate(n for _, n in queries)], dtype=torch.int32, device=DEVICE),
        kv_lens=torch.tensor([length for length, _ in queries], dtype=torch.int32, device=DEVICE),
        block_tables=tables.to(DEVICE, torch.int32),
        num_decodes=sum(num == 1 for _, num in queries),
        query_lens_host=[num for _, num in queries],
        kv_lens_host=[length for length, _ in queries],
        kv=[pools],
    )


def random(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(DEVICE)


def num_processors(queries: list[tuple[int, int]], kv_heads: int, splits: int) -> int:
    """Return a number of multiprocessors for which each of the sequences `queries` is cut into up to `splits` parts."""
    processors = 1 if splits == 1 else splits * len(queries) * kv_heads // 2
    assert choose_splits(len(queries), kv_heads, processors) == splits
    return processors


# With 8 splits a part of a sequence is one KV block, as with 32. The interpreter is faster with fewer splits.
SPLITS = pytest.mark.parametrize("splits", [1, 8], ids=["whole", "split"])


@pytest.mark.parametrize(
    ("queries", "heads", "kv_heads"),
    [
        *((MIXED, heads, kv_heads) for heads, kv_heads in ((4, 2), (3, 3), (8, 1), (6, 2), (7, 1))),
        (DECODES, 4, 2),
        (CHUNKS, 4, 2),
    ],
    ids=["mixed-4-2", "mixed-3-3", "mixed-8-1", "mixed-6-2", "mixed-7-1", "decodes", "chunks"],
)
@SPLITS
def test_a_step_equals_plain_attention(queries, heads, kv_heads, splits):
    generator, processors = torch.Generator().manual_seed(0), num_processors(queries, kv_heads, splits)
    num_blocks = len(queries) * max(-(-length // BLOCK) for length, _ in queries)
    cached = {name: random(num_blocks, BLOCK, kv_heads, 32, generator=generator) for name in ("k", "v")}
    tokens = sum(num for _, num in queries)
    # q, k and v are views of one tensor, as in a model.
    qkv = random(tokens, heads + 2 * kv_heads, 32, generator=generator)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)

    def run(attention: PagedGqa, *, by_length: bool = False) -> torch.Tensor:
        pools = {name: pool.clone() for name, pool in cached.items()}
        batch = make_batch(queries, pools, torch.Generator().manual_seed(1))
        if by_length:
            batch = replace(batch, by_length=True, num_decodes=0, query_lens_host=[], kv_lens_host=[])
        write(pools["k"], k, batch.slots)
        write(pools["v"], v, batch.slots)
        return attention.prepare(batch).attend(q, k, v, pools, scale=0.2)

    expected = run(TorchGqa())
    for _ in range(1 if splits == 1 else 2):  # the second run fails if the first left its arrival counters changed
        torch.testing.assert_close(run(TritonGqa(processors)), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(run(TritonGqa(processors), by_length=True), expected, atol=2e-5, rtol=1e-4)


# Two chunks and a decode behind long contexts, and a short prompt: few tiles, so several programs share each.
LONG_CONTEXTS = [(300, 5), (200, 1), (333, 70), (9, 9)]


@pytest.mark.parametrize("by_length", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (7, 1)])
def test_few_tiles_are_divided_into_parts(heads, kv_heads, by_length, monkeypatch):
    written = spy_on_parts(monkeypatch)
    monkeypatch.setattr(paged_prefill, "PART_KEYS", 32)
    monkeypatch.setattr(paged_prefill, "PROGRAMS", 8)
    for _ in range(2):  # the second run fails if the first left its arrival counters changed
        expected, found = attend_twice(LONG_CONTEXTS, heads, kv_heads, by_length=by_length)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert some_were_written(written)


def spy_on_parts(monkeypatch) -> list[torch.Tensor]:
    """Fill the memory of every later launch's parts with NaN first. Returns a list of these tensors, which grows."""
    written, places = [], tile_parts.places

    def poisoned(*args):
        acc, lse = places(*args)
        written.append(acc.fill_(torch.nan))
        return acc, lse.fill_(torch.nan)

    monkeypatch.setattr(tile_parts, "places", poisoned)
    return written


def some_were_written(launches: list[torch.Tensor]) -> bool:
    """Return whether each launch wrote some of its parts [places, rows, dim], but not all."""
    return all(0 < int((~parts.isnan()).all(2).all(1).sum()) < parts.shape[0] for parts in launches)


def attend_twice(queries, heads: int, kv_heads: int, *, by_length: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from the same random step by the plain twin and by Triton. Returns both results."""
    generator = torch.Generator().manual_seed(0)
    num_blocks = len(queries) * max(-(-length // BLOCK) for length, _ in queries)
    pools = {name: random(num_blocks, BLOCK, kv_heads, 32, generator=generator) for name in ("k", "v")}
    q, k, v = (random(sum(num for _, num in queries), n, 32, generator=generator) for n in (heads, kv_heads, kv_heads))
    batch = replace(make_batch(queries, pools, torch.Generator().manual_seed(1)), num_decodes=0)
    write(pools["k"], k, batch.slots)
    write(pools["v"], v, batch.slots)
    expected = TorchGqa().prepare(batch).attend(q, k, v, pools, scale=0.2)
    if by_length:
        batch = replace(batch, by_length=True, query_lens_host=[], kv_lens_host=[])
    return expected, TritonGqa(8).prepare(batch).attend(q, k, v, pools, scale=0.2)


@SPLITS
def test_only_the_last_tokens_attend(splits):
    """The last layer of a model computes only the tokens whose hidden states are read.

    Each of these tokens attends as a decode, over the KV that the step has written.
    """
    processors = num_processors(MIXED, 2, splits)
    generator = torch.Generator().manual_seed(0)
    num_blocks = len(MIXED) * max(-(-length // BLOCK) for length, _ in MIXED)
    pools = {name: random(num_blocks, BLOCK, 2, 32, generator=generator) for name in ("k", "v")}
    batch = make_batch(MIXED, pools, generator)
    q, k, v = random(batch.num_tokens, 4 + 2 * 2, 32, generator=generator).split([4, 2, 2], 1)
    write(pools["k"], k, batch.slots)
    write(pools["v"], v, batch.slots)
    expected = TorchGqa().prepare(batch).attend(q, k, v, pools, scale=0.2)
    index = batch.query_starts[1:].long() - 1
    read = batch.last_tokens(index, batch.kv_lens, batch.block_tables, batch.kv_lens_host)
    own = (x.index_select(0, index) for x in (q, k, v))
    out = TritonGqa(processors).prepare(read.batch).attend(*own, pools, scale=0.2)
    torch.testing.assert_close(out, expected[index], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("splits", "parts"),
    [
        (1, [1, 1, 1, 1, 1, 1, 1, 1]),
        (2, [2, 2, 1, 1, 1, 1, 1, 1]),
        (4, [4, 4, 4, 2, 1, 1, 1, 1]),
        (32, [20, 17, 32, 9, 8, 3, 1, 1]),
    ],
)
def test_a_long_sequence_is_cut_into_several_parts(splits, parts, monkeypatch):
    """With at most 2 parts, a sequence has a part for each started 512 tokens; with at most 4, one for each started 128.

    With other numbers of parts, it has at most one for each KV block. No part is empty.
    """
    generator, heads, kv_heads = torch.Generator().manual_seed(0), 4, 2
    lens = torch.tensor([640, 513, 512, 129, 128, 33, 16, 1], dtype=torch.int32, device=DEVICE)
    width = -(-640 // BLOCK)
    tables = torch.randperm(8 * width, generator=generator).view(8, width).to(DEVICE, torch.int32)
    q = random(8, heads, 32, generator=generator)
    k, v = (random(8 * width, BLOCK, kv_heads, 32, generator=generator) for _ in range(2))
    out, made = torch.empty_like(q), []
    with monkeypatch.context() as patched:
        patched.setattr(
            torch, "empty", lambda *shape, **options: made.append(torch.full(shape, torch.nan, **options)) or made[-1]
        )
        paged_decode(q, k, v, tables, lens, 0.2, splits, out)
    if splits > 1:
        written = (~made[1].isnan()).sum(2)  # number of log-sum-exps [B, heads]; a sequence with one part writes none
        assert written.tolist() == [[num if num > 1 else 0] * heads for num in parts]
    # The second run fails if the first left its arrival counters changed.
    for found in (out, paged_decode(q, k, v, tables, lens, 0.2, splits)):
        for i, length in enumerate(lens.tolist()):
            keys, values = (pool[tables[i].long()].flatten(0, 1)[:length].repeat_interleave(2, 1) for pool in (k, v))
            weights = (torch.einsum("hd,lhd->hl", q[i], keys) * 0.2).softmax(-1)
            torch.testing.assert_close(found[i], torch.einsum("hl,lhd->hd", weights, values), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("spans", [[range(20), range(20, 40)], [range(20)], [range(20, 40)]], ids=["all", "first", "second"])
def test_long_prompts_go_to_the_library(spans, monkeypatch):
    """The library takes all prompts in one call if they have one length and are the whole step.

    Otherwise it takes each long prompt in a call of its own, and our kernel computes the rest of the step.
    """
    generator, queries = torch.Generator().manual_seed(0), [(20, 20), (20, 20)]
    qkv = random(40, 4 + 2 * 2, 32, generator=generator)
    q, k, v = qkv.split([4, 2, 2], 1)
    pools = {name: random(2 * 2, BLOCK, 2, 32, generator=generator) for name in ("k", "v")}
    batch = make_batch(queries, pools, generator)
    write(pools["k"], k, batch.slots)
    write(pools["v"], v, batch.slots)
    expected = TorchGqa().prepare(batch).attend(q, k, v, pools, scale=0.2)
    calls = use_any_library(monkeypatch)
    step = TritonGqa(132).prepare(batch)
    monkeypatch.setattr(step, "_long", LongChunks(Prompts(spans, together=len(spans) == 2), []))
    torch.testing.assert_close(step.attend(q, k, v, pools, scale=0.2), expected, atol=2e-5, rtol=1e-4)
    assert calls == [(len(spans), 4, 32, 32)]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs cuDNN's attention")
@pytest.mark.parametrize(("num", "length"), [(1, 1100), (2, 1100), (2, 1024)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "v_dim"), [(16, 8, 128, 128), (16, 16, 192, 128)])
def test_cudnn_attends_to_several_prompts_in_one_call(heads, kv_heads, dim, v_dim, num, length):
    generator, tokens = torch.Generator().manual_seed(0), num * length
    q, k, v = random(tokens, heads + 2 * kv_heads, dim, generator=generator).bfloat16().split([heads, kv_heads, kv_heads], 1)
    v = v[..., :v_dim]
    out = long_prompts.attend(q, k, v, 0.1, num)
    for i in range(num):
        span = slice(i * length, (i + 1) * length)
        keys, values = (x[span].float().repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[span].float(), keys) * 0.1
        weights = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), float("-inf")).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", weights, values)
        assert (out[span] - expected).norm() / expected.norm() < 1e-2


def use_any_library(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Let torch choose a library in place of cuDNN for long prompts, and pad the prompts to 16 tokens.

    Returns a list that gets the query shape of each of the library's calls, in order.
    """
    calls: list[tuple[int, ...]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def called(q, k, v, **options):
        calls.append(tuple(q.shape))
        return attend(q, k, v, **options)

    monkeypatch.setattr(long_prompts, "sdpa_kernel", lambda backend: nullcontext())
    monkeypatch.setattr(long_prompts, "LENGTH_STEP", 16)
    monkeypatch.setattr(long_prompts.F, "scaled_dot_product_attention", called)
    return calls
