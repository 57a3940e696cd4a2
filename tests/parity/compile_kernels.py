"""Compiles a group of kernels for a Hopper GPU at the shapes of real models: `python compile_kernels.py GROUP`. Needs no GPU.

`test_triton_compile.py` runs this script once for each group, without Triton's interpreter. The script replaces each kernel by a
Recorder, and then launches it as the engine does. The Recorder compiles the kernel for the arguments instead of running it. The
script prints "compiled" once all kernels of the group are compiled.
"""

import importlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels import (
    argmax,
    elementwise,
    experts,
    gather_inputs,
    latent_prepare,
    latent_products,
    launch,
    linear,
    merge_parts,
    mla_decode,
    mla_mixed,
    mla_prefill,
    paged_decode,
    paged_prefill,
    query_tiles,
    sample_filtered,
    sort_pairs,
)
from engine.kernels.hardware import GPUS
from engine.layers import moe_cuda
from engine.layers.kinds import RoutingSpec
from engine.layers.moe import MoeMlp
from engine.layers.ops import PlainOps

SHARED_MEMORY = 227 << 10  # bytes of shared memory that a program may use on Hopper
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float64: "*fp64",
}
BF16, META = torch.bfloat16, torch.device("meta")


def zeros(*shape, dtype=BF16):
    return torch.zeros(shape, dtype=dtype)


def ints(*shape):
    return zeros(*shape, dtype=torch.int32)


class Recorder:
    """Replaces a kernel. A launch `recorder[grid](...)` compiles the kernel for the arguments, and adds `name` to `compiled`."""

    def __init__(self, kernel, name, compiled):
        self._kernel = kernel
        self._name = name
        self._compiled = compiled

    def __getitem__(self, grid):
        return self._compile

    def _compile(self, *args, num_warps=4, num_stages=3, launch_pdl=False, **constants):
        names = self._kernel.arg_names
        values = dict(zip(names, args, strict=False))
        signature = {name: kind(value) for name, value in values.items()} | dict.fromkeys(constants, "constexpr")
        options = {"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": launch_pdl}
        tensors = [name for name, value in values.items() if isinstance(value, torch.Tensor)]
        aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in tensors}
        constexprs = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(self._kernel, signature, constexprs, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.metadata.shared <= SHARED_MEMORY, f"{self._name}: {compiled.metadata.shared} bytes of shared memory"
        self._compiled.add(self._name)


def kind(value):
    """Return Triton's name for the type of the argument `value`."""
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


TABLES, LENS = ints(2, 4), torch.ones(2, dtype=torch.int32)
STARTS = torch.tensor([0, 1, 2], dtype=torch.int32)


GQA_SHAPES = (  # each shape is (query heads, K/V heads, head dimension, type); groups of 5 heads have the tiles of groups of 7
    (28, 4, 128, BF16),
    (24, 8, 128, BF16),
    (16, 8, 256, BF16),
    (32, 8, 128, torch.float32),
)


def gqa_decodes():
    for heads, kv_heads, head, dtype in GQA_SHAPES:
        q, cache = zeros(2, heads, head, dtype=dtype), zeros(8, 64, kv_heads, head, dtype=dtype)
        # Of the shapes of a kernel with the same number of warps, those with most stages need most shared memory.
        for splits in (1, 2, 4, 8) if heads == 28 else (1, 4):
            paged_decode.paged_decode(q, cache, cache, TABLES, LENS, 0.1, splits)
        many = zeros(2 * paged_decode.MANY_PROGRAMS, heads, head, dtype=dtype)  # with so many, a GPU splits no sequence
        paged_decode.paged_decode(many, cache, cache, TABLES, LENS, 0.1, 1)


def gqa_chunks():
    for heads, kv_heads, head, dtype in GQA_SHAPES:
        q, cache = zeros(2, heads, head, dtype=dtype), zeros(8, 64, kv_heads, head, dtype=dtype)
        paged_prefill.paged_prefill(q, cache, cache, TABLES, LENS, STARTS, query_tiles.Tiles(LENS, LENS, LENS), 0.1, q)
    query_tiles.map_tiles(STARTS, 512, 64, least=2)
    for heads, dim in ((32, 128), (16, 128), (128, 128)):
        lse = zeros(heads, 2, dtype=torch.float32)
        part = merge_parts.Part(zeros(2, heads, dim), lse)
        total = merge_parts.merge_parts(part, part)
        merge_parts.merge_parts(merge_parts.merge_parts(total, part), part, part.out)


def small_operations():
    hidden, weight = zeros(2, 2048), zeros(2048)
    elementwise.silu_mul(hidden)
    elementwise.norm(zeros(2, 1536), zeros(1536), 1e-6)
    qkv, angle, slots = zeros(2, 32, 128), zeros(2, 1, 128, dtype=torch.float32), zeros(2, dtype=torch.int64)
    pools = {name: zeros(4, 64, 8, 128) for name in ("k", "v")}
    elementwise.norm_rotate(qkv, (angle, angle), (weight, weight), 1e-6, slots, pools)
    half = angle[..., :64].contiguous()  # GLM-4-MoE and MiniMax-M2 rotate half of each head
    elementwise.norm_rotate(qkv, (half, half), (weight, weight), 1e-6, slots, pools)
    elementwise.norm_rotate(qkv, (half, half), None, 1e-6, slots, pools)
    elementwise.angles(slots, zeros(64, dtype=torch.float32), 1.0)


MLA_SHAPES = ((16, 1), (16, 256), (128, 64))  # each shape is (heads, tokens)


def mla_decodes():
    for heads, num in MLA_SHAPES:
        q_latent, q_rope, pool = zeros(num, heads, 512), zeros(num, heads, 192)[..., 128:], zeros(8, 64, 576)
        for splits in (1, 4):
            mla_decode.merge(mla_decode.mla_decode(q_latent, q_rope, pool, TABLES, LENS, 0.1, splits), BF16)
        if num == 1:
            kv_b = zeros(heads, 256, 512)
            latent_products.absorb_few(zeros(num, heads, 192), kv_b, 128)
            parts = mla_decode.mla_decode(q_latent, q_rope, pool, TABLES, LENS, 0.1, 64)
            latent_products.merge_expand(*parts, kv_b, 128, zeros(num, heads, 128))
    # In float32 the kernel takes a smaller tile, which must be compiled too.
    q, rope, pool = (zeros(*shape, dtype=torch.float32) for shape in ((64, 128, 512), (64, 128, 64), (8, 64, 576)))
    mla_decode.mla_decode(q, rope, pool, TABLES, LENS, 0.1, 1)


def mla_chunks():
    for heads, num in MLA_SHAPES:
        q, kv, kv_b, pool = zeros(num, heads, 192), zeros(num, 576), zeros(heads, 256, 512), zeros(8, 64, 576)
        angle, slots, out = zeros(num, 1, 64, dtype=torch.float32), zeros(num, dtype=torch.int64), zeros(num, heads, 128)
        latent_prepare.latent_prepare(q, kv, (kv_b[0, 0], 1e-6), (angle, angle), slots, pool, interleaved=True)
        q_latent = latent_products.absorb(q, kv_b, 128)
        mla_mixed.mla_mixed(q_latent, q[..., 128:], pool, TABLES, LENS, STARTS, query_tiles.Tiles(LENS, LENS, LENS), 0.1)
        expanded = zeros(num, heads, 256)
        latent_products.build_keys(expanded, kv, 128, 512)
        tiles, tile = ints(3, 1), mla_prefill.choose_tile(BF16)
        mla_prefill.mla_prefill(out, q, expanded, kv[:, 512:], STARTS, LENS, tiles, 0.1, tile)


def products():
    few = (
        (1, 1024, 2048),
        (2, 6144, 4096),
        (1, 4096, 1024),
        (4, 3648, 2048),
        (5, 1024, 3072),
        (33, 2048, 10944),
        (64, 5632, 2048),
    )
    for rows, outputs, size in (*few, (96, 6144, 1024), (128, 28672, 2048)):
        x, w = zeros(rows, size), zeros(outputs, size)
        linear.linear(x, w, x[0])  # x[0] serves as the bias, of which only the type matters
        linear.gated(x, w)
        linear.add_linear(zeros(rows, outputs), x, w)
        if rows == 1:
            linear.linear(x, w, norm=(x[0], 1e-6))
            linear.gated(x, w, norm=(x[0], 1e-6))


ROUTING = {
    "deepseek-v2-lite": RoutingSpec(num_experts=64, top_k=6),
    "qwen3-moe": RoutingSpec(num_experts=128, top_k=8, normalize=True),
    "deepseek-v3": RoutingSpec(num_experts=256, top_k=8, method="noaux_tc", n_group=8, topk_group=4, normalize=True, scale=2.5),
}


def mixtures():
    for name, hidden, size, shared_size, router_dtype in (
        ("deepseek-v2-lite", 2048, 1408, 2816, torch.float32),
        ("qwen3-moe", 2048, 768, 0, BF16),
        ("deepseek-v3", 7168, 2048, 2048, torch.float32),
    ):
        spec = ROUTING[name]
        moe = MoeMlp(spec, hidden, size, shared_size=shared_size, router_dtype=router_dtype, dtype=BF16, device=META)
        for tokens in (1, 64):
            x = torch.empty(tokens, hidden, dtype=BF16, device=META)
            routed = moe_cuda.route(moe, x)
        if name == "deepseek-v2-lite":
            moe_cuda.run_few(x, moe, x, routed, moe_cuda.STRIPS)
            for _, cut in moe_cuda.CUTS:
                moe_cuda.run_cut(x, moe, x, routed, cut, PlainOps())
            experts.spread(x, ints(tokens * spec.top_k))
        for tokens in (1, 8192):  # pairs that fit into one part of the sort, and pairs that need many parts
            sort_pairs.sort_pairs(ints(tokens, spec.top_k), spec.num_experts, 128)


def gathering_and_sampling():
    rows, numbers, latest = ints(2), zeros(2, dtype=torch.float64), zeros(2, dtype=torch.int64)
    for dtype in (BF16, torch.float32):
        logits = zeros(2, 151936, dtype=dtype)
        tokens = argmax.argmax_tokens(logits, rows, latest)
        params = sample_filtered.SampleParams(*[numbers] * len(sample_filtered.SampleParams._fields))
        sample_filtered.sample_filtered(logits, rows, latest, tokens, numbers, params)
    gather_inputs.gather_decodes(rows, rows, latest, TABLES, 64)
    gather_inputs.gather_mixed(rows, rows, rows, rows, rows, latest, TABLES, 64)


class Group(NamedTuple):
    launch: Callable[[], None]
    kernels: frozenset[str]  # "module.kernel" of each kernel that `launch` launches, in engine/kernels


GROUPS = {
    "gqa-decodes": Group(gqa_decodes, frozenset({"paged_decode._decode"})),
    "gqa-chunks": Group(gqa_chunks, frozenset({"paged_prefill._prefill", "query_tiles._map_tiles", "merge_parts._merge"})),
    "mla-decodes": Group(
        mla_decodes,
        frozenset({"mla_decode._split", "mla_decode._merge", "latent_products._absorb_few", "latent_products._merge_expand"}),
    ),
    "mla-chunks": Group(
        mla_chunks,
        frozenset(
            {
                "latent_prepare._prepare",
                "latent_products._absorb",
                "latent_products._build_keys",
                "mla_mixed._attend",
                "mla_prefill._prefill",
            }
        ),
    ),
    "products": Group(products, frozenset({"gemv._gemv", "skinny._skinny"})),
    "mixtures": Group(
        mixtures,
        frozenset(
            {
                "experts._spread",
                "experts._add_weighted",
                "experts_few._few_up",
                "experts_few._few_down",
                "experts_tiles._tiles_up",
                "experts_tiles._tiles_down",
                "routing._logits",
                "routing._route",
                "sort_pairs._count",
                "sort_pairs._sort",
            }
        ),
    ),
    "small-operations": Group(
        small_operations,
        frozenset({"elementwise._norm", "elementwise._silu_mul", "elementwise._norm_rotate", "elementwise._angles"}),
    ),
    "gathering-and-sampling": Group(
        gathering_and_sampling,
        frozenset(
            {
                "argmax._argmax",
                "gather_inputs._gather_decodes",
                "gather_inputs._gather_mixed",
                "sample_filtered._survey",
                "sample_filtered._finish",
            }
        ),
    ),
}


def replace_kernels() -> set[str]:
    """Replace every kernel by a Recorder. Returns the set that gets the names of the compiled kernels."""
    launch.properties = lambda device: GPUS["h200"]
    compiled: set[str] = set()
    for name in frozenset[str]().union(*(group.kernels for group in GROUPS.values())):
        module_name, _, kernel = name.partition(".")
        module = importlib.import_module(f"engine.kernels.{module_name}")
        setattr(module, kernel, Recorder(getattr(module, kernel), name, compiled))
    return compiled


if __name__ == "__main__":
    group = GROUPS[sys.argv[1]]
    compiled = replace_kernels()
    group.launch()
    assert compiled >= group.kernels, f"in the group, but not launched: {sorted(group.kernels - compiled)}"
    sys.stdout.write("compiled\n")
