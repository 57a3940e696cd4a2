"""Decode attention directly in the pool, compared with attention written out row by row; and the cases without a plan."""

from __future__ import annotations

import pytest
import torch

from engine.attention.in_pool import plan


@pytest.mark.parametrize(("kv_heads", "shared"), [(1, 4), (2, 2), (3, 1)])
def test_attention_in_the_pool_equals_attention_row_by_row(kv_heads, shared):
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(12, 4, kv_heads, 8, generator=generator), torch.randn(12, 4, kv_heads, 8, generator=generator)
    q = torch.randn(3, kv_heads, shared, 8, generator=generator)
    rows, lens = [[9, 2, 5], [3], [10, 4]], [10, 1, 8]
    found = plan(rows, lens, 4, torch.float32)
    assert found is not None
    out = found.attend(q, k, v, 0.3)
    for i, (blocks, length) in enumerate(zip(rows, lens, strict=True)):
        keys, values = k[blocks].flatten(0, 1)[:length], v[blocks].flatten(0, 1)[:length]
        weights = (torch.einsum("hgd,lhd->hgl", q[i], keys) * 0.3).softmax(-1)
        torch.testing.assert_close(out[i], torch.einsum("hgl,lhd->hgd", weights, values))


def test_there_is_no_plan_if_blocks_are_shared_or_mostly_unused():
    assert plan([[1, 2], [1, 3]], [6, 7], 4, torch.float32) is None
    assert plan([[1], [9]], [3, 3], 4, torch.float32) is None
