"""Each kernel by itself on this CUDA device, at shapes of real models: `CASES` is the table, one line a kernel and shape.

A CUDA graph chains the launches, so that what launching costs the host does not count. Each launch has tensors of its own, as
many as it takes to push the first out of the L2 cache: a model, too, finds weights and KV in memory. Small ones stay in the
cache, as activations do.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

from engine.kernels import elementwise, linear
from engine.kernels.mla_decode import decode_splits, mla_decode
from engine.kernels.paged_decode import choose_splits, paged_decode
from engine.kernels.paged_prefill import paged_prefill, tile_tokens

_COLD = 256 << 20  # bytes; several times any L2 cache
_MAX_COPIES = 64
_LAUNCHES = 32  # in a graph, at least
_REPLAYS = 15  # the median counts
_BLOCK = 64  # tokens in a block of the cache
_HEAD = 128
_DTYPE = torch.bfloat16


class Launch(NamedTuple):
    """One launch, over tensors of its own."""

    run: Callable[[], object]
    num_bytes: int  # that must be read or written
    operations: int  # two for each multiply-add; 0 where memory alone counts


class Case(NamedTuple):
    kernel: str
    make: Callable[..., Launch]  # from a device and `sizes`
    sizes: dict[str, int]

    @property
    def shape(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in self.sizes.items())


class Timing(NamedTuple):
    """Of one launch."""

    seconds: float
    num_bytes: int
    operations: int


def _random(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=_DTYPE, device=device)


def _tables(device: torch.device, seqs: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Block tables of sequences whose blocks lie scattered, and their lengths."""
    width = -(-context // _BLOCK)
    tables = torch.randperm(seqs * width, device=device).to(torch.int32).view(seqs, width)
    return tables, torch.full((seqs,), context, dtype=torch.int32, device=device)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def decode(device: torch.device, seqs: int, context: int, heads: int, kv_heads: int) -> Launch:
    tables, lens = _tables(device, seqs, context)
    k, v = (_random(device, tables.numel(), _BLOCK, kv_heads, _HEAD) for _ in range(2))
    q = _random(device, seqs, heads, _HEAD)
    splits = choose_splits(seqs, kv_heads, _processors(device))
    num_bytes = 2 * q.nbytes + 2 * seqs * context * kv_heads * _HEAD * q.itemsize
    return Launch(lambda: paged_decode(q, k, v, tables, lens, _HEAD**-0.5, splits), num_bytes, 4 * seqs * context * heads * _HEAD)


def prefill(device: torch.device, seqs: int, context: int, heads: int, kv_heads: int) -> Launch:
    """Whole prompts."""
    tables, lens = _tables(device, seqs, context)
    k, v = (_random(device, tables.numel(), _BLOCK, kv_heads, _HEAD) for _ in range(2))
    q = _random(device, seqs * context, heads, _HEAD)
    out = torch.empty_like(q)
    starts = torch.arange(seqs + 1, dtype=torch.int32, device=device) * context
    first = torch.arange(0, context, tile_tokens(heads, kv_heads), dtype=torch.int32, device=device).flip(0)  # most work first
    queries = torch.arange(seqs, dtype=torch.int32, device=device).repeat(len(first))
    tiles = (queries, first.repeat_interleave(seqs))
    num_bytes = 2 * q.nbytes + 2 * seqs * context * kv_heads * _HEAD * q.itemsize
    return Launch(
        lambda: paged_prefill(q, k, v, tables, lens, starts, tiles, _HEAD**-0.5, out),
        num_bytes,
        2 * seqs * context * (context + 1) * heads * _HEAD,
    )


def latent_decode(device: torch.device, seqs: int, context: int, heads: int, latent: int, rope: int) -> Launch:
    tables, lens = _tables(device, seqs, context)
    cache = _random(device, tables.numel(), _BLOCK, latent + rope)
    q_latent, q_rope = _random(device, seqs, heads, latent), _random(device, seqs, heads, rope)
    splits = decode_splits(seqs, heads, _processors(device))
    num_bytes = 2 * q_latent.nbytes + q_rope.nbytes + seqs * context * (latent + rope) * cache.itemsize
    return Launch(
        lambda: mla_decode(q_latent, q_rope, cache, tables, lens, 0.1, splits),
        num_bytes,
        2 * seqs * context * heads * (2 * latent + rope),
    )


def add_norm(device: torch.device, rows: int, hidden: int) -> Launch:
    x, delta, weight = _random(device, rows, hidden), _random(device, rows, hidden), _random(device, hidden)
    return Launch(lambda: elementwise.add_norm(x, delta, weight, 1e-6), 4 * x.nbytes + weight.nbytes, 0)


def silu_mul(device: torch.device, rows: int, size: int) -> Launch:
    gate_up = _random(device, rows, 2 * size)
    return Launch(lambda: elementwise.silu_mul(gate_up), gate_up.nbytes * 3 // 2, 0)


def norm_rotate(device: torch.device, rows: int, heads: int, kv_heads: int) -> Launch:
    qkv, weight = _random(device, rows, heads + 2 * kv_heads, _HEAD), _random(device, _HEAD)
    angle = torch.randn(rows, 1, _HEAD, device=device)
    pools = {name: _random(device, -(-rows // _BLOCK), _BLOCK, kv_heads, _HEAD) for name in ("k", "v")}
    slots = torch.randperm(rows, device=device)
    return Launch(
        lambda: elementwise.norm_rotate(qkv, (angle, angle), (weight, weight), 1e-6, slots, pools),
        2 * qkv.nbytes + 2 * angle.nbytes,
        0,
    )


def product(device: torch.device, rows: int, outputs: int, inputs: int) -> Launch:
    x, weight = _random(device, rows, inputs), _random(device, outputs, inputs)
    num_bytes = x.nbytes + weight.nbytes + rows * outputs * x.itemsize
    return Launch(lambda: linear.linear(x, weight), num_bytes, 2 * rows * outputs * inputs)


def gated(device: torch.device, rows: int, size: int, inputs: int) -> Launch:
    x, weight = _random(device, rows, inputs), _random(device, 2 * size, inputs)
    num_bytes = x.nbytes + weight.nbytes + rows * size * x.itemsize
    return Launch(lambda: linear.gated(x, weight), num_bytes, 4 * rows * size * inputs)


def cublas(device: torch.device, rows: int, outputs: int, inputs: int) -> Launch:
    """torch's own, for comparison."""
    x, weight = _random(device, rows, inputs), _random(device, outputs, inputs)
    num_bytes = x.nbytes + weight.nbytes + rows * outputs * x.itemsize
    return Launch(lambda: torch.nn.functional.linear(x, weight), num_bytes, 2 * rows * outputs * inputs)


CASES = (
    Case("paged_decode", decode, {"seqs": 1, "context": 1100, "heads": 32, "kv_heads": 8}),
    Case("paged_decode", decode, {"seqs": 8, "context": 8000, "heads": 32, "kv_heads": 8}),
    Case("paged_decode", decode, {"seqs": 64, "context": 300, "heads": 16, "kv_heads": 8}),
    Case("paged_decode", decode, {"seqs": 256, "context": 700, "heads": 16, "kv_heads": 8}),
    Case("paged_prefill", prefill, {"seqs": 1, "context": 8192, "heads": 32, "kv_heads": 8}),
    Case("paged_prefill", prefill, {"seqs": 16, "context": 512, "heads": 32, "kv_heads": 8}),
    Case("mla_decode", latent_decode, {"seqs": 1, "context": 1100, "heads": 16, "latent": 512, "rope": 64}),
    Case("mla_decode", latent_decode, {"seqs": 64, "context": 300, "heads": 16, "latent": 512, "rope": 64}),
    Case("mla_decode", latent_decode, {"seqs": 256, "context": 700, "heads": 16, "latent": 512, "rope": 64}),
    Case("mla_decode", latent_decode, {"seqs": 8, "context": 8000, "heads": 128, "latent": 512, "rope": 64}),
    Case("add_norm", add_norm, {"rows": 1, "hidden": 4096}),
    Case("add_norm", add_norm, {"rows": 8192, "hidden": 4096}),
    Case("silu_mul", silu_mul, {"rows": 64, "size": 14336}),
    Case("silu_mul", silu_mul, {"rows": 8192, "size": 14336}),
    Case("norm_rotate", norm_rotate, {"rows": 64, "heads": 32, "kv_heads": 8}),
    Case("norm_rotate", norm_rotate, {"rows": 8192, "heads": 32, "kv_heads": 8}),
    Case("linear", product, {"rows": 1, "outputs": 6144, "inputs": 4096}),
    Case("linear", product, {"rows": 1, "outputs": 4096, "inputs": 14336}),
    Case("linear", product, {"rows": 64, "outputs": 4096, "inputs": 14336}),
    Case("linear", product, {"rows": 1, "outputs": 1024, "inputs": 3072}),
    Case("gated", gated, {"rows": 1, "size": 14336, "inputs": 4096}),
    Case("gated", gated, {"rows": 64, "size": 14336, "inputs": 4096}),
    Case("cublas", cublas, {"rows": 1, "outputs": 4096, "inputs": 14336}),
    Case("cublas", cublas, {"rows": 64, "outputs": 4096, "inputs": 14336}),
    Case("cublas", cublas, {"rows": 8192, "outputs": 28672, "inputs": 4096}),
)


def measure(case: Case) -> Timing:
    device = torch.device("cuda")
    first = case.make(device, **case.sizes)
    copies = min(_MAX_COPIES, -(-_COLD // first.num_bytes))
    launches = [first, *(case.make(device, **case.sizes) for _ in range(copies - 1))]
    first.run()  # compiles
    torch.cuda.synchronize()
    num = max(len(launches), _LAUNCHES)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num):
            launches[i % len(launches)].run()
    graph.replay()
    seconds = statistics.median(_replay_seconds(graph) for _ in range(_REPLAYS))
    return Timing(seconds / num, first.num_bytes, first.operations)


def _replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    graph.replay()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1000
