"""Benchmark launches of matrix products, and of the kernels between the matrix products of a dense model."""

from __future__ import annotations

import torch

from engine.kernels import elementwise, linear
from engine.kernels.cases.base import BLOCK, Launch, random

HEAD = 128


def norm(device: torch.device, rows: int, hidden: int) -> Launch:
    x, weight = random(device, rows, hidden), random(device, hidden)
    return Launch(lambda: elementwise.norm(x, weight, 1e-6), 2 * x.nbytes + weight.nbytes, 0)


def silu_mul(device: torch.device, rows: int, size: int) -> Launch:
    gate_up = random(device, rows, 2 * size)
    return Launch(lambda: elementwise.silu_mul(gate_up), gate_up.nbytes * 3 // 2, 0)


def norm_rotate(device: torch.device, rows: int, heads: int, kv_heads: int) -> Launch:
    qkv, weight = random(device, rows, heads + 2 * kv_heads, HEAD), random(device, HEAD)
    angle = torch.randn(rows, 1, HEAD, device=device)
    pools = {name: random(device, -(-rows // BLOCK), BLOCK, kv_heads, HEAD) for name in ("k", "v")}
    slots = torch.randperm(rows, device=device)
    return Launch(
        lambda: elementwise.norm_rotate(qkv, (angle, angle), (weight, weight), 1e-6, slots, pools),
        2 * qkv.nbytes + 2 * angle.nbytes,
        0,
    )


def angles(device: torch.device, rows: int, rope: int) -> Launch:
    positions, inv_freq = torch.arange(rows, device=device), torch.rand(rope // 2, device=device)
    num_bytes = positions.nbytes + inv_freq.nbytes + 2 * rows * rope * inv_freq.itemsize
    return Launch(lambda: elementwise.angles(positions, inv_freq, 1.0), num_bytes, 0)


def product(device: torch.device, rows: int, outputs: int, inputs: int) -> Launch:
    x, weight = random(device, rows, inputs), random(device, outputs, inputs)
    num_bytes = x.nbytes + weight.nbytes + rows * outputs * x.itemsize
    return Launch(lambda: linear.linear(x, weight), num_bytes, 2 * rows * outputs * inputs)


def norm_product(device: torch.device, outputs: int, inputs: int) -> Launch:
    """Make a launch of the product of a single row with a fused norm."""
    x, weight, norm = random(device, 1, inputs), random(device, outputs, inputs), random(device, inputs)
    num_bytes = x.nbytes + weight.nbytes + norm.nbytes + outputs * x.itemsize
    return Launch(lambda: linear.linear(x, weight, norm=(norm, 1e-6)), num_bytes, 2 * outputs * inputs)


def add_product(device: torch.device, rows: int, outputs: int, inputs: int) -> Launch:
    """Make a launch of a product that is added to the residual stream."""
    x, weight, out = random(device, rows, inputs), random(device, outputs, inputs), random(device, rows, outputs)
    num_bytes = x.nbytes + weight.nbytes + 2 * out.nbytes

    def run() -> torch.Tensor:
        linear.add_linear(out, x, weight)
        return out

    return Launch(run, num_bytes, 2 * rows * outputs * inputs)


def cublas_add(device: torch.device, rows: int, outputs: int, inputs: int) -> Launch:
    """Make a launch of torch's product of many rows, added to the residual stream."""
    x, weight, out = random(device, rows, inputs), random(device, outputs, inputs), random(device, rows, outputs)
    num_bytes = x.nbytes + weight.nbytes + 2 * out.nbytes
    return Launch(lambda: out.addmm_(x, weight.t()), num_bytes, 2 * rows * outputs * inputs)


def gated(device: torch.device, rows: int, size: int, inputs: int) -> Launch:
    x, weight = random(device, rows, inputs), random(device, 2 * size, inputs)
    num_bytes = x.nbytes + weight.nbytes + rows * size * x.itemsize
    return Launch(lambda: linear.gated(x, weight), num_bytes, 4 * rows * size * inputs)


def cublas(device: torch.device, rows: int, outputs: int, inputs: int) -> Launch:
    """Make a launch of torch's product, with which our kernels are compared."""
    x, weight = random(device, rows, inputs), random(device, outputs, inputs)
    num_bytes = x.nbytes + weight.nbytes + rows * outputs * x.itemsize
    return Launch(lambda: torch.nn.functional.linear(x, weight), num_bytes, 2 * rows * outputs * inputs)
