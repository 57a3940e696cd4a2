"""Tests the small operations between matrix products: `CudaOps`, which runs kernels, against `PlainOps`."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import elementwise
from engine.layers.kinds import RopeSpec
from engine.layers.ops import PlainOps, ops_for
from engine.layers.ops_cuda import CudaOps
from engine.layers.rotary import Rotary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAIN, CUDA = PlainOps(), CudaOps()
POSITIONS = torch.tensor([0, 1, 5, 9, 2, 30001], device=DEVICE)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


@pytest.mark.parametrize(("device", "rotary_dim", "kind"), [("cpu", 64, PlainOps), ("cuda", 64, CudaOps), ("cuda", 96, PlainOps)])
def test_ops_are_kernels_on_cuda_if_the_rotary_part_is_a_power_of_two(device, rotary_dim, kind):
    assert type(ops_for(torch.device(device), rotary_dim)) is kind


@pytest.mark.parametrize("size", [64, 100])
def test_norm_of_rows_that_are_not_adjacent(size):
    x, weight = random(5, size + 1)[:, :size], random(size)
    torch.testing.assert_close(CUDA.norm(x, weight, 1e-6), PLAIN.norm(x, weight, 1e-6))


@pytest.mark.parametrize("size", [64, 100, 3000])
def test_silu_mul(size):
    gate_up = random(3, 2 * size)
    torch.testing.assert_close(CUDA.silu_mul(gate_up), PLAIN.silu_mul(gate_up.clone()))


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(4, 2), (3, 3), (14, 1)])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("rotated", [16, 8, 4, 12, 0])
def test_norm_rotate(q_heads, kv_heads, normed, rotated):
    """`rotated` of the 16 numbers of a head are rotated."""
    heads = random(6, q_heads + 2 * kv_heads, 16)
    weights = (random(16), random(16) + 1) if normed else None
    angles = Rotary(RopeSpec(dim=rotated, theta=100.0), device=DEVICE).plain(POSITIONS) if rotated else None
    slots = torch.tensor([7, 0, 3, 11, 5, 2], device=DEVICE)
    plain = {name: torch.zeros(3, 4, kv_heads, 16, device=DEVICE) for name in ("k", "v")}
    pools = {name: pool.clone() for name, pool in plain.items()}
    expected = PLAIN.norm_rotate(heads.clone(), angles, weights, 1e-6, slots, plain)
    found = CUDA.norm_rotate(heads, angles, weights, 1e-6, slots, pools)
    for a, b in zip((*found, *pools.values()), (*expected, *plain.values()), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dim", [16, 24])
def test_angles(dim):
    rotary = Rotary(RopeSpec(dim=dim, theta=100.0, magnitude=1.25), device=DEVICE)
    found = elementwise.angles(POSITIONS, rotary.inv_freq, rotary.magnitude)
    for a, b in zip(found, rotary.plain(POSITIONS), strict=True):
        torch.testing.assert_close(a, b)
