"""Measures each kernel by itself on this CUDA device, at shapes of real models. `CASES` has a line for each kernel and shape.

A CUDA graph holds a chain of launches, so the host's launch cost does not count. The launches use many copies of the tensors in
turn. Each copy is evicted from the L2 cache before it is used again, since a model also reads weights and KV from memory. Small
tensors, of which the allowed copies fit into the cache, stay in the cache, as activations do in a model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

from engine.kernels.cases import attention, dense, experts, step
from engine.kernels.cases.base import Launch

_COLD = 256 << 20  # bytes that all copies of a case's tensors should take together: several times any L2 cache
_MAX_COPIES = 64  # a case's tensors are copied at most this many times
_LAUNCHES = 32  # a graph holds at least this many launches
_REPLAYS = 15  # the graph is replayed this many times, and the median time counts


class Case(NamedTuple):
    """One benchmark case: a kernel, and the shape at which it is measured."""

    kernel: str
    make: Callable[..., Launch]  # makes the launch to measure; called with a device and `sizes`
    sizes: dict[str, int]

    @property
    def shape(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in self.sizes.items())


class Timing(NamedTuple):
    """The measured time of one kernel launch, the bytes that it moves and its floating-point operations."""

    seconds: float
    num_bytes: int
    operations: int


CASES = (
    Case("paged_decode", attention.decode, {"seqs": 1, "context": 1100, "heads": 32, "kv_heads": 8}),
    Case("paged_decode", attention.decode, {"seqs": 8, "context": 8000, "heads": 32, "kv_heads": 8}),
    Case("paged_decode", attention.decode, {"seqs": 64, "context": 300, "heads": 16, "kv_heads": 8}),
    Case("paged_decode", attention.decode, {"seqs": 256, "context": 700, "heads": 16, "kv_heads": 8}),
    Case("paged_prefill", attention.prefill, {"seqs": 1, "context": 8192, "heads": 32, "kv_heads": 8}),
    Case("paged_prefill", attention.prefill, {"seqs": 16, "context": 512, "heads": 32, "kv_heads": 8}),
    Case("paged_decode", attention.decode, {"seqs": 1, "context": 120_000, "heads": 32, "kv_heads": 8}),
    Case("chunk", attention.chunk, {"tokens": 16, "behind": 512, "heads": 32, "kv_heads": 8}),
    Case("chunk", attention.chunk, {"tokens": 16, "behind": 32768, "heads": 32, "kv_heads": 8}),
    Case("chunk", attention.chunk, {"tokens": 256, "behind": 8192, "heads": 32, "kv_heads": 8}),
    Case("chunk", attention.chunk, {"tokens": 512, "behind": 1024, "heads": 32, "kv_heads": 8}),
    Case("chunk", attention.chunk, {"tokens": 512, "behind": 32768, "heads": 32, "kv_heads": 8}),
    Case("map_tiles", attention.tiles_of_step, {"seqs": 64, "chunk": 960, "tile": 4}),
    Case("latent_prepare", attention.latent_prepare, {"rows": 1, "heads": 16, "nope": 128, "rope": 64, "latent": 512}),
    Case("latent_prepare", attention.latent_prepare, {"rows": 64, "heads": 16, "nope": 128, "rope": 64, "latent": 512}),
    Case("latent_prepare", attention.latent_prepare, {"rows": 8192, "heads": 16, "nope": 128, "rope": 64, "latent": 512}),
    Case("latent_alone", attention.latent_alone, {"context": 1100, "heads": 16, "nope": 128, "rope": 64, "latent": 512}),
    Case("absorb", attention.absorb, {"rows": 64, "heads": 16, "nope": 128, "rope": 64, "latent": 512}),
    Case("absorb", attention.absorb, {"rows": 256, "heads": 16, "nope": 128, "rope": 64, "latent": 512}),
    Case("expand", attention.expand, {"rows": 64, "heads": 16, "nope": 128, "latent": 512}),
    Case("expand", attention.expand, {"rows": 256, "heads": 16, "nope": 128, "latent": 512}),
    Case("build_keys", attention.build_keys, {"rows": 8192, "heads": 16, "nope": 128, "rope": 64, "latent": 512}),
    Case("mla_decode", attention.latent_decode, {"seqs": 8, "context": 1100, "heads": 16, "latent": 512, "rope": 64}),
    Case("mla_decode", attention.latent_decode, {"seqs": 64, "context": 300, "heads": 16, "latent": 512, "rope": 64}),
    Case("mla_decode", attention.latent_decode, {"seqs": 256, "context": 700, "heads": 16, "latent": 512, "rope": 64}),
    Case("mla_decode", attention.latent_decode, {"seqs": 8, "context": 8000, "heads": 128, "latent": 512, "rope": 64}),
    Case("mla_decode", attention.latent_decode, {"seqs": 1, "context": 120_000, "heads": 16, "latent": 512, "rope": 64}),
    Case("latent_chunk", attention.latent_chunk, {"tokens": 16, "behind": 512, "heads": 16, "latent": 512, "rope": 64}),
    Case("latent_chunk", attention.latent_chunk, {"tokens": 16, "behind": 32768, "heads": 16, "latent": 512, "rope": 64}),
    Case("latent_chunk", attention.latent_chunk, {"tokens": 256, "behind": 8192, "heads": 16, "latent": 512, "rope": 64}),
    Case("mla_prefill", attention.latent_prefill, {"seqs": 1, "context": 8192, "heads": 16, "nope": 128, "rope": 64}),
    Case("mla_prefill", attention.latent_prefill, {"seqs": 16, "context": 512, "heads": 16, "nope": 128, "rope": 64}),
    Case("mla_mixed", attention.latent_mixed, {"seqs": 1, "chunk": 63, "context": 300, "heads": 16, "latent": 512}),
    Case("mla_mixed", attention.latent_mixed, {"seqs": 64, "chunk": 192, "context": 300, "heads": 16, "latent": 512}),
    Case("mla_mixed", attention.latent_mixed, {"seqs": 64, "chunk": 960, "context": 700, "heads": 16, "latent": 512}),
    Case("norm", dense.norm, {"rows": 64, "hidden": 1536}),
    Case("norm", dense.norm, {"rows": 8192, "hidden": 4096}),
    Case("silu_mul", dense.silu_mul, {"rows": 64, "size": 14336}),
    Case("silu_mul", dense.silu_mul, {"rows": 8192, "size": 14336}),
    Case("norm_rotate", dense.norm_rotate, {"rows": 1, "heads": 32, "kv_heads": 8}),
    Case("norm_rotate", dense.norm_rotate, {"rows": 64, "heads": 32, "kv_heads": 8}),
    Case("norm_rotate", dense.norm_rotate, {"rows": 8192, "heads": 32, "kv_heads": 8}),
    Case("angles", dense.angles, {"rows": 64, "rope": 128}),
    Case("angles", dense.angles, {"rows": 8192, "rope": 128}),
    Case("linear", dense.product, {"rows": 1, "outputs": 6144, "inputs": 4096}),
    Case("linear", dense.product, {"rows": 1, "outputs": 1024, "inputs": 3072}),
    Case("linear", dense.product, {"rows": 1, "outputs": 4096, "inputs": 14336}),
    Case("norm_linear", dense.norm_product, {"outputs": 4096, "inputs": 1024}),
    Case("add_linear", dense.add_product, {"rows": 1, "outputs": 4096, "inputs": 14336}),
    Case("add_linear", dense.add_product, {"rows": 64, "outputs": 4096, "inputs": 14336}),
    Case("linear", dense.product, {"rows": 16, "outputs": 4096, "inputs": 14336}),
    Case("linear", dense.product, {"rows": 64, "outputs": 4096, "inputs": 14336}),
    Case("gated", dense.gated, {"rows": 1, "size": 14336, "inputs": 4096}),
    Case("gated", dense.gated, {"rows": 16, "size": 14336, "inputs": 4096}),
    Case("gated", dense.gated, {"rows": 64, "size": 14336, "inputs": 4096}),
    Case("gated", dense.gated, {"rows": 128, "size": 14336, "inputs": 4096}),
    Case("cublas", dense.cublas, {"rows": 1, "outputs": 4096, "inputs": 14336}),
    Case("cublas", dense.cublas, {"rows": 16, "outputs": 4096, "inputs": 14336}),
    Case("cublas", dense.cublas, {"rows": 64, "outputs": 4096, "inputs": 14336}),
    Case("cublas", dense.cublas, {"rows": 8192, "outputs": 28672, "inputs": 4096}),
    Case("cublas", dense.cublas, {"rows": 8192, "outputs": 4096, "inputs": 14336}),
    Case("cublas_add", dense.cublas_add, {"rows": 8192, "outputs": 4096, "inputs": 14336}),
    Case("gather_decodes", step.gather_decodes, {"seqs": 64, "context": 1000}),
    Case("gather_decodes", step.gather_decodes, {"seqs": 256, "context": 8000}),
    Case("gather_mixed", step.gather_mixed, {"seqs": 64, "chunk": 960, "context": 1000}),
    Case("argmax", step.argmax, {"rows": 1, "vocab": 151936}),
    Case("argmax", step.argmax, {"rows": 64, "vocab": 151936}),
    Case("sample_filtered", step.sample_filtered, {"rows": 64, "vocab": 151936, "top_k": 151936, "top_percent": 100}),
    Case("sample_filtered", step.sample_filtered, {"rows": 64, "vocab": 151936, "top_k": 20, "top_percent": 95}),
    Case("router_logits", experts.logits, {"tokens": 1, "experts": 64, "hidden": 2048}),
    Case("router_logits", experts.logits, {"tokens": 64, "experts": 64, "hidden": 2048}),
    Case("router_logits", experts.logits, {"tokens": 8192, "experts": 64, "hidden": 2048}),
    Case("route", experts.route, {"tokens": 1, "experts": 64, "hidden": 2048}),
    Case("route", experts.route, {"tokens": 64, "experts": 64, "hidden": 2048}),
    Case("route", experts.route, {"tokens": 8192, "experts": 64, "hidden": 2048}),
    Case("sort_pairs", experts.sort, {"tokens": 64, "experts": 64, "block": 16, "shared": 2}),
    Case("sort_pairs", experts.sort, {"tokens": 256, "experts": 64, "block": 32, "shared": 0}),
    Case("sort_pairs", experts.sort, {"tokens": 8192, "experts": 64, "block": 128, "shared": 0}),
    Case("moe_few", experts.few, {"tokens": 1, "experts": 64, "hidden": 2048, "size": 1408}),
    Case("moe_few", experts.few, {"tokens": 2, "experts": 64, "hidden": 2048, "size": 1408}),
    Case("moe_tiles", experts.tiles, {"tokens": 64, "experts": 64, "hidden": 2048, "size": 1408}),
    Case("moe_tiles", experts.tiles, {"tokens": 256, "experts": 64, "hidden": 2048, "size": 1408}),
    Case("moe_grouped", experts.grouped, {"tokens": 8192, "experts": 64, "hidden": 2048, "size": 1408}),
)


def measure(case: Case) -> Timing:
    """Measure the median time of one launch of `case` on the current CUDA device."""
    device = torch.device("cuda")
    first = case.make(device, **case.sizes)
    copies = min(_MAX_COPIES, -(-_COLD // first.num_bytes))
    launches = [first, *(case.make(device, **case.sizes) for _ in range(copies - 1))]
    first.run()  # compiles the kernel before the graph is captured
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
