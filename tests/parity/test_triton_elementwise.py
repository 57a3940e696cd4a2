"""The small Triton kernels beside `PlainOps`, their twin."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import elementwise
from engine.layers.kinds import RopeSpec
from engine.layers.ops import PlainOps
from engine.layers.rotary import Rotary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAIN = PlainOps()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


@pytest.mark.parametrize("size", [64, 100])
@pytest.mark.parametrize("add", [True, False])
def test_add_norm(size, add):
    hidden, weight = random(5, size), random(size)
    delta = random(5, size + 1)[:, :size].contiguous() if add else None
    plain = hidden.clone()
    expected = PLAIN.add_norm(plain, delta, weight, 1e-6)
    torch.testing.assert_close(elementwise.add_norm(hidden, delta, weight, 1e-6), expected)
    assert torch.equal(hidden, plain)


@pytest.mark.parametrize("size", [64, 100, 3000])
def test_silu_mul(size):
    gate_up = random(3, 2 * size)
    torch.testing.assert_close(elementwise.silu_mul(gate_up), PLAIN.silu_mul(gate_up.clone()))


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 2), (3, 3)])
@pytest.mark.parametrize("normed", [True, False])
def test_norm_rotate(q_heads, kv_heads, normed):
    heads = random(6, q_heads + 2 * kv_heads, 16)
    weights = (random(16), random(16) + 1) if normed else None
    rotary = Rotary(RopeSpec(dim=16, theta=100.0), device=DEVICE)
    cos, sin = rotary(torch.tensor([0, 1, 5, 9, 2, 77], device=DEVICE))
    shape = {"q_heads": q_heads, "kv_heads": kv_heads, "weights": weights, "eps": 1e-6}
    expected = PLAIN.norm_rotate(heads.clone(), cos, sin, **shape)
    values = heads[:, q_heads + kv_heads :].clone()
    found = elementwise.norm_rotate(heads, cos, sin, **shape)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(heads[:, q_heads + kv_heads :], values)
