"""Tests of attention in parts: the two ways to compute a part, and that merged parts are attention to all keys."""

import pytest
import torch
from torch.nn import functional as F

from engine.attention import spilled
from engine.attention.spilled import Part, attend_part, merge, plain_part

KV_HEADS, EACH, DIM = 2, 3, 16


def random_part(num_queries, num_keys, v_dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (KV_HEADS, EACH, num_queries, DIM), (KV_HEADS, num_keys, DIM), (KV_HEADS, num_keys, v_dim)
    q, k, v = (torch.randn(shape, generator=generator) * 2 for shape in shapes)
    return q, (k, v)


@pytest.mark.parametrize(("num_queries", "num_keys", "causal"), [(7, 7, True), (1, 1, True), (5, 40, False), (1, 9, False)])
@pytest.mark.parametrize("v_dim", [DIM, 5])
def test_a_part_is_the_same_by_the_kernel_of_a_cpu_and_by_plain_products(num_queries, num_keys, causal, v_dim):
    q, (k, v) = random_part(num_queries, num_keys, v_dim)
    fast = attend_part(q, (k, v), 0.3, causal=causal)
    plain = plain_part(q, k.unsqueeze(1), v.unsqueeze(1), 0.3, causal=causal)
    assert fast.out.shape == (KV_HEADS, EACH, num_queries, v_dim)
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_merged_parts_are_attention_to_all_keys():
    q, (k, v) = random_part(4, 30, DIM)
    parts = [attend_part(q, (k[:, a:b], v[:, a:b]), 0.3, causal=False) for a, b in ((0, 1), (1, 20), (20, 30))]
    merged = merge(merge(parts[0], parts[1]), parts[2])
    whole = F.scaled_dot_product_attention(q, k.unsqueeze(1), v.unsqueeze(1), scale=0.3)
    torch.testing.assert_close(merged.out, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.lse, attend_part(q, (k, v), 0.3, causal=False).lse, rtol=1e-5, atol=1e-5)


def test_a_part_whose_scores_are_far_larger_than_those_of_another_decides_alone():
    small = Part(torch.ones(1, 1, 1, 2), torch.full((1, 1, 1), -300.0))
    large = Part(torch.full((1, 1, 1, 2), 5.0), torch.full((1, 1, 1), 300.0))
    for merged in (merge(small, large), merge(large, small)):
        assert merged.out.tolist() == [[[[5.0, 5.0]]]]
        assert merged.lse.item() == 300.0


@pytest.mark.parametrize("query_tokens", [3, 512])
def test_a_chunk_is_attended_to_in_tiles(monkeypatch, query_tokens):
    monkeypatch.setattr(spilled, "QUERY_TOKENS", query_tokens)
    q, (k, v) = random_part(10, 25, DIM)
    flat = q.permute(2, 0, 1, 3).flatten(1, 2)
    own, cached = (k[:, 15:], v[:, 15:]), [(k[:, :7], v[:, :7]), (k[:, 7:15], v[:, 7:15])]
    out = spilled._attend(flat, own, cached, 0.3)
    mask = torch.ones(10, 25, dtype=torch.bool).tril(15)
    whole = F.scaled_dot_product_attention(q, k.unsqueeze(1), v.unsqueeze(1), attn_mask=mask, scale=0.3)
    torch.testing.assert_close(out, whole.permute(2, 0, 1, 3).flatten(1, 2), rtol=1e-5, atol=1e-5)
