"""Tests latent attention by Triton against its plain twins: the kernels around attention, and whole steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.attention import latent_chunks, torch_mla
from engine.attention.base import PagedMla
from engine.attention.cached_context import LongChunks
from engine.attention.long_prompts import Prompts
from engine.attention.torch_mla import TorchMla
from engine.attention.triton_mla import TritonMla
from engine.kernels import latent_products, mla_mixed
from engine.kernels import mla_decode as mla_decode_module
from engine.kernels.hardware import shared_memory
from engine.kernels.mla_decode import decode_splits, decode_tile, merge, mla_decode
from engine.layers.ops import PlainOps, write
from engine.layers.ops_cuda import CudaOps
from tests.parity.test_triton_attention import (
    BLOCK,
    CHUNKS,
    DECODES,
    DEVICE,
    MIXED,
    make_batch,
    random,
    some_were_written,
    spy_on_parts,
    use_any_library,
)

RANK, ROPE, NOPE, V_DIM = 32, 16, 24, 16
FRESH = [(40, 40), (3, 3), (33, 33)]
ALONE = [(33, 1)]
# Two chunks and a decode behind long contexts, and a short prompt. In float32 a tile is one token, so these are 27 tiles.
LONG_CONTEXTS = [(300, 5), (200, 1), (333, 12), (9, 9)]


def close(out: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize(("heads", "rank"), [(4, 32), (20, 24)])
def test_latent_prepare_equals_plain_ops(heads, rank, interleaved, dtype):
    generator = torch.Generator().manual_seed(0)
    tokens, q_size = 5, heads * (NOPE + ROPE)
    # q and kv are views of one tensor, as in a model.
    both = random(tokens, q_size + rank + ROPE, generator=generator).to(dtype)
    norm = (random(rank, generator=generator).to(dtype), 1e-6)
    angles = (random(tokens, 1, ROPE, generator=generator), random(tokens, 1, ROPE, generator=generator))
    slots = torch.randperm(3 * BLOCK, generator=generator)[:tokens].to(DEVICE)
    results = []
    for ops in (PlainOps(), CudaOps()):
        q, kv = both.clone().split([q_size, rank + ROPE], 1)
        pool = torch.zeros(3, BLOCK, rank + ROPE, dtype=dtype, device=DEVICE)
        q = q.view(tokens, heads, NOPE + ROPE)
        results.append((*ops.latent_prepare(q, kv, norm, angles, slots, pool, interleaved=interleaved), pool))
    for out, expected in zip(results[1], results[0], strict=True):
        # The kernel's fused multiply-add may round the last bit of a bfloat16 differently than torch.
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("num", [1, 3, 70])
def test_absorb_and_expand_equal_their_twins(num):
    heads = 3
    generator = torch.Generator().manual_seed(0)
    q = random(num, heads * (NOPE + ROPE) + 8, generator=generator)[:, :-8].view(num, heads, NOPE + ROPE)
    kv_b = random(heads, NOPE + V_DIM, RANK, generator=generator)
    for absorb in (latent_products.absorb, latent_products.absorb_few):
        close(absorb(q, kv_b, NOPE), torch_mla.absorb(q, kv_b, NOPE)[..., :RANK])
    mixed = random(num, heads, RANK, generator=generator)
    out = torch.empty(num, heads, V_DIM, device=DEVICE)
    latent_products.expand(mixed, kv_b, NOPE, out)
    close(out, torch_mla.expand_output(mixed, kv_b, NOPE))


@pytest.mark.parametrize(("heads", "splits"), [(3, 1), (3, 4), (20, 8)])
def test_both_merges_of_a_split_decode(heads, splits):
    generator = torch.Generator().manual_seed(0)
    lens = torch.tensor([1, 33, 100], dtype=torch.int32, device=DEVICE)  # the first two sequences leave some splits empty
    tables = torch.randperm(3 * 7, generator=generator).view(3, 7).to(DEVICE, torch.int32)
    cache = random(3 * 7, BLOCK, RANK + ROPE, generator=generator)
    q, q_rope = random(3, heads, RANK, generator=generator), random(3, heads, ROPE, generator=generator)
    kv_b = random(heads, NOPE + V_DIM, RANK, generator=generator) / RANK**0.5
    records = [cache[tables[i].long()].flatten(0, 1)[:length] for i, length in enumerate(lens.tolist())]
    scores = [torch.cat((q, q_rope), -1)[i] @ own.T * 0.2 for i, own in enumerate(records)]
    expected = torch.stack([score.softmax(-1) @ own[:, :RANK] for score, own in zip(scores, records, strict=True)])
    args = (q, q_rope, cache, tables, lens, 0.2, splits)
    parts = mla_decode(*args)
    if splits > 1:
        parts.latents[parts.lse == -torch.inf] = torch.nan  # the latents of empty splits are not written
    close(merge(parts, torch.float32), expected)
    if splits > 1:
        out = torch.empty(3, heads, V_DIM, device=DEVICE)
        latent_products.merge_expand(*parts, kv_b, NOPE, out)
        close(out, torch_mla.expand_output(expected, kv_b, NOPE))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("tokens", [32, 64])
@pytest.mark.parametrize(("heads", "sequences"), [(3, 16), (20, 8)])
def test_a_decode_with_passes_of_64_tokens(heads, sequences, tokens, splits, monkeypatch):
    """In half precision, a decode of many sequences or heads has passes of 64 tokens if the device has enough shared memory.

    Otherwise it has passes of 32 tokens.
    """
    if tokens == 32:
        monkeypatch.setattr(mla_decode_module, "shared_memory", lambda device: mla_decode_module.LARGE_PASS_MEMORY - 1)
    elif shared_memory(DEVICE) < mla_decode_module.LARGE_PASS_MEMORY:
        pytest.skip("needs the shared memory of a Hopper GPU")
    generator, half = torch.Generator().manual_seed(0), torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
    lens = torch.tensor([1, 64, 65, 200] * (sequences // 4), dtype=torch.int32, device=DEVICE)
    tables = torch.randperm(sequences * 4, generator=generator).view(sequences, 4).to(DEVICE, torch.int32)
    cache = random(sequences * 4, 64, RANK + ROPE, generator=generator).to(half)
    q, q_rope = (random(sequences, heads, size, generator=generator).to(half) for size in (RANK, ROPE))
    assert decode_tile(sequences, heads, q.dtype, 64, q.device).tokens == tokens
    parts = mla_decode(q, q_rope, cache, tables, lens, 0.2, splits)
    merged = merge(parts, torch.float32).float()  # with one split the result has the type of q
    for i, length in enumerate(lens.tolist()):
        own = cache[tables[i].long()].flatten(0, 1)[:length].float()
        scores = torch.cat((q, q_rope), -1)[i].float() @ own.T * 0.2
        torch.testing.assert_close(merged[i], scores.softmax(-1) @ own[:, :RANK], atol=2e-2, rtol=2e-2)


def test_splits_give_each_multiprocessor_a_program():
    half = torch.bfloat16
    assert [decode_splits(num, 16, 132, half) for num in (1, 2, 8, 16, 64, 128, 132, 133)] == [64, 16, 16, 8, 2, 2, 2, 1]
    assert [decode_splits(num, 128, 132, half) for num in (7, 8, 64, 66, 67)] == [2, 8, 1, 1, 1]
    assert decode_tile(64, 128, half, 32, DEVICE).tokens == 32  # a pass has at most the tokens of a KV block


def test_build_keys_equals_its_twin():
    heads, tokens = 3, 5
    generator = torch.Generator().manual_seed(0)
    cached = random(tokens, RANK + ROPE + 8, generator=generator)[:, :-8]
    kv_b = random(heads, NOPE + V_DIM, RANK, generator=generator)
    keys, values = torch_mla.expand_latent(cached, kv_b, NOPE)
    expanded = torch.cat((keys[..., :NOPE], values), -1).transpose(0, 1).contiguous()
    assert torch.equal(latent_products.build_keys(expanded, cached, NOPE, RANK), keys.transpose(0, 1))


@pytest.mark.parametrize("queries", [MIXED, DECODES, CHUNKS, FRESH, ALONE], ids=["mixed", "decodes", "chunks", "fresh", "alone"])
@pytest.mark.parametrize(("heads", "processors"), [(4, 1), (4, 132), (20, 1)], ids=["whole", "split", "many heads"])
def test_a_step_equals_plain_attention(queries, heads, processors, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    num_blocks = len(queries) * max(-(-length // BLOCK) for length, _ in queries)
    cached = random(num_blocks, BLOCK, RANK + ROPE, generator=generator)
    tokens = sum(num for _, num in queries)
    q = random(tokens, heads * (NOPE + ROPE) + 8, generator=generator)[:, :-8].view(tokens, heads, NOPE + ROPE)
    records = random(tokens, RANK + ROPE + 8, generator=generator)[:, :-8]
    kv_b = random(heads, NOPE + V_DIM, RANK, generator=generator) / RANK**0.5
    # The limit is so small that the two chunks behind cached prefixes are expanded one after the other.
    monkeypatch.setattr(latent_chunks, "EXPANDED_NUMBERS", 100 * heads * (NOPE + V_DIM))

    def run(attention: PagedMla, *, by_length: bool = False) -> torch.Tensor:
        pools = {"latent": cached.clone()}
        batch = make_batch(queries, pools, torch.Generator().manual_seed(1))
        if by_length:
            batch = replace(batch, by_length=True, num_decodes=0, query_lens_host=[], kv_lens_host=[])
        write(pools["latent"], records, batch.slots)
        return attention.prepare(batch).attend(q, records, kv_b, pools, scale=0.2)

    expected = run(TorchMla())
    close(run(TritonMla(processors)), expected)
    close(run(TritonMla(processors), by_length=True), expected)


@pytest.mark.parametrize("heads", [4, 20])
def test_few_tiles_are_divided_into_parts(heads, monkeypatch):
    written = spy_on_parts(monkeypatch)
    monkeypatch.setattr(mla_mixed, "PART_TOKENS", 32)
    monkeypatch.setattr(mla_mixed, "processors", lambda _: 128)
    generator = torch.Generator().manual_seed(0)
    tokens = sum(num for _, num in LONG_CONTEXTS)
    pools = {"latent": random(4 * -(-333 // BLOCK), BLOCK, RANK + ROPE, generator=generator)}
    q, records = (random(tokens, *shape, generator=generator) for shape in ((heads, NOPE + ROPE), (RANK + ROPE,)))
    kv_b = random(heads, NOPE + V_DIM, RANK, generator=generator) / RANK**0.5
    batch = replace(make_batch(LONG_CONTEXTS, pools, torch.Generator().manual_seed(1)), num_decodes=0)
    write(pools["latent"], records, batch.slots)
    captured = replace(batch, by_length=True, query_lens_host=[], kv_lens_host=[])
    for _ in range(2):  # the second run fails if the first left its arrival counters changed
        expected, found = (
            attention.prepare(step).attend(q, records, kv_b, pools, scale=0.2)
            for attention, step in ((TorchMla(), batch), (TritonMla(132), captured))
        )
        close(found, expected)
    assert some_were_written(written)


@pytest.mark.parametrize(("heads", "processors"), [(4, 1), (4, 132), (20, 1)], ids=["whole", "split", "many heads"])
def test_only_the_last_tokens_attend(heads, processors):
    """The last layer of a model computes only the tokens whose hidden states are read.

    Each of these tokens attends as a decode, over the records that the step has written.
    """
    generator = torch.Generator().manual_seed(0)
    num_blocks = len(MIXED) * max(-(-length // BLOCK) for length, _ in MIXED)
    pools = {"latent": random(num_blocks, BLOCK, RANK + ROPE, generator=generator)}
    batch = make_batch(MIXED, pools, generator)
    q = random(batch.num_tokens, heads, NOPE + ROPE, generator=generator)
    records = random(batch.num_tokens, RANK + ROPE, generator=generator)
    kv_b = random(heads, NOPE + V_DIM, RANK, generator=generator) / RANK**0.5
    write(pools["latent"], records, batch.slots)
    expected = TorchMla().prepare(batch).attend(q, records, kv_b, pools, scale=0.2)
    index = batch.query_starts[1:].long() - 1
    read = batch.last_tokens(index, batch.kv_lens, batch.block_tables, batch.kv_lens_host)
    step = TritonMla(processors).prepare(read.batch)
    close(step.attend(q[index], records[index], kv_b, pools, scale=0.2), expected[index])


def test_long_prompts_in_a_step_with_others(monkeypatch):
    """A library, here one that torch chooses, computes the long prompts of a step. Our kernels compute the rest of the step."""
    queries, heads = [(33, 1), (20, 20), (70, 37), (40, 40), (5, 5)], 2
    generator = torch.Generator().manual_seed(0)
    cached = random(5 * 5, BLOCK, RANK + ROPE, generator=generator)
    tokens = sum(num for _, num in queries)
    q, records = random(tokens, heads, NOPE + ROPE, generator=generator), random(tokens, RANK + ROPE, generator=generator)
    kv_b = random(heads, NOPE + V_DIM, RANK, generator=generator) / RANK**0.5
    pools = {"latent": cached}
    batch = make_batch(queries, pools, generator)
    write(cached, records, batch.slots)
    expected = TorchMla().prepare(batch).attend(q, records, kv_b, pools, scale=0.2)

    use_any_library(monkeypatch)
    step = TritonMla(132).prepare(batch)
    monkeypatch.setattr(step, "_long", LongChunks(Prompts([range(1, 21), range(58, 98)], together=False), []))
    close(step.attend(q, records, kv_b, pools, scale=0.2), expected)


def test_long_prompts_that_are_the_whole_step(monkeypatch):
    """If prompts of one length are the whole step, one call of the library computes all of them."""
    queries, heads = [(20, 20), (20, 20)], 2
    generator = torch.Generator().manual_seed(0)
    pools = {"latent": random(2 * 2, BLOCK, RANK + ROPE, generator=generator)}
    q, records = random(40, heads, NOPE + ROPE, generator=generator), random(40, RANK + ROPE, generator=generator)
    kv_b = random(heads, NOPE + V_DIM, RANK, generator=generator) / RANK**0.5
    batch = make_batch(queries, pools, generator)
    write(pools["latent"], records, batch.slots)
    expected = TorchMla().prepare(batch).attend(q, records, kv_b, pools, scale=0.2)
    calls = use_any_library(monkeypatch)
    step = TritonMla(132).prepare(batch)
    monkeypatch.setattr(step, "_long", LongChunks(Prompts([range(20), range(20, 40)], together=True), []))
    close(step.attend(q, records, kv_b, pools, scale=0.2), expected)
    assert calls == [(2, heads, 32, NOPE + ROPE)]
