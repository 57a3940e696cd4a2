"""Which pools have kernels on CUDA."""

import pytest
import torch

from engine.attention.select import _has_kernel
from engine.batch import PoolSpec


@pytest.mark.parametrize(
    ("head", "dtype", "has"),
    [
        (128, torch.bfloat16, True),
        (256, torch.bfloat16, True),
        (512, torch.bfloat16, False),
        (128, torch.float32, True),
        (256, torch.float32, False),
        (96, torch.bfloat16, False),
        (8, torch.float32, False),
    ],
)
def test_heads_that_have_a_kernel(head, dtype, has):
    assert _has_kernel(PoolSpec(name="k", shape=(2, head), dtype=dtype)) == has


@pytest.mark.parametrize(("rank", "rope", "has"), [(512, 64, True), (384, 64, False), (512, 8, False)])
def test_latents_need_both_parts_to_have_a_kernel(rank, rope, has):
    pool = PoolSpec(name="latent", shape=(rank + rope,), dtype=torch.bfloat16, parts=(rank, rope))
    assert _has_kernel(pool) == has
