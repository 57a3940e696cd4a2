"""Compiles the attention kernels for a Hopper GPU, which needs none: run by test_triton_compile.py without the interpreter."""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels import (
    draw,
    elementwise,
    experts,
    latent,
    launch,
    linear,
    mla_decode,
    mla_mixed,
    mla_prefill,
    paged_decode,
    paged_prefill,
    routing,
    sample,
    step_inputs,
)
from engine.layers import moe_cuda
from engine.layers.kinds import RoutingSpec
from engine.layers.moe import MoeMlp
from engine.layers.ops import PlainOps

SHARED_MEMORY = 227 << 10  # bytes that a program may have on Hopper


def record(kernel):
    """Stand in for the launcher: compile what would have been launched."""

    def launch(*args, num_warps=4, num_stages=3, grid=None, warmup=False, launch_pdl=False, **constants):
        names = kernel.arg_names
        values = dict(zip(names, args, strict=False))
        signature = {n: kind(v) for n, v in values.items()} | dict.fromkeys(constants, "constexpr")
        options = {"num_warps": num_warps, "num_stages": num_stages, "launch_pdl": launch_pdl}
        aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, v in values.items() if isinstance(v, torch.Tensor)}
        source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        assert compiled.metadata.shared <= SHARED_MEMORY, f"{names}: {compiled.metadata.shared} bytes of shared memory"

    return launch


def kind(value):
    if isinstance(value, torch.Tensor):
        return {
            torch.bfloat16: "*bf16",
            torch.float32: "*fp32",
            torch.int32: "*i32",
            torch.int64: "*i64",
            torch.float64: "*fp64",
        }[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


class Recorder:
    def __init__(self, kernel):
        self.launch = record(kernel)

    def __getitem__(self, grid):
        return self.launch


launch._has_pdl = lambda device: True
for module, name in (
    (paged_decode, "_decode"),
    (paged_prefill, "_prefill"),
    (mla_decode, "_split"),
    (mla_decode, "_merge"),
):
    setattr(module, name, Recorder(getattr(module, name)))
tables, lens = torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
starts = torch.tensor([0, 1, 2], dtype=torch.int32)
for heads, kv_heads, head, dtype in (
    *((28, 4, 128, torch.bfloat16), (24, 8, 128, torch.bfloat16), (40, 8, 128, torch.bfloat16)),
    *((16, 8, 256, torch.bfloat16), (32, 8, 128, torch.float32)),
):
    q, cache = torch.zeros(2, heads, head, dtype=dtype), torch.zeros(8, 64, kv_heads, head, dtype=dtype)
    paged_prefill.paged_prefill(q, cache, cache, tables, lens, starts, (lens, lens), 0.1, q)
    for splits in (1, 2, 4, 8):
        paged_decode.paged_decode(q, cache, cache, tables, lens, 0.1, splits)
    many = torch.zeros(2 * paged_decode.MANY_PROGRAMS, heads, head, dtype=dtype)  # where nothing is split on a GPU of this size
    paged_decode.paged_decode(many, cache, cache, tables, lens, 0.1, 1)
for name in ("_norm", "_silu_mul", "_norm_rotate", "_angles"):
    setattr(elementwise, name, Recorder(getattr(elementwise, name)))
hidden, weight = torch.zeros(2, 2048, dtype=torch.bfloat16), torch.zeros(2048, dtype=torch.bfloat16)
elementwise.silu_mul(hidden)
qkv, angle, slots = torch.zeros(2, 32, 128, dtype=torch.bfloat16), torch.zeros(2, 1, 128), torch.zeros(2, dtype=torch.int64)
pools = {name: torch.zeros(4, 64, 8, 128, dtype=torch.bfloat16) for name in ("k", "v")}
elementwise.norm_rotate(qkv, (angle, angle), (weight, weight), 1e-6, slots, pools)
elementwise.angles(slots, torch.zeros(64), 1.0)
for module, names in (
    (mla_prefill, ("_prefill",)),
    (mla_mixed, ("_attend",)),
    (latent, ("_prepare", "_absorb", "_absorb_few", "_merge_expand", "_build_keys")),
):
    for name in names:
        setattr(module, name, Recorder(getattr(module, name)))
for heads, num in ((16, 1), (16, 256), (128, 64)):
    q, kv = torch.zeros(num, heads, 192, dtype=torch.bfloat16), torch.zeros(num, 576, dtype=torch.bfloat16)
    kv_b, pool = torch.zeros(heads, 256, 512, dtype=torch.bfloat16), torch.zeros(8, 64, 576, dtype=torch.bfloat16)
    angle, slots, out = torch.zeros(num, 1, 64), torch.zeros(num, dtype=torch.int64), q[..., :128].contiguous()
    latent.latent_prepare(q, kv, (kv_b[0, 0], 1e-6), (angle, angle), slots, pool, interleaved=True)
    q_latent = latent.absorb(q, kv_b, 128)
    for splits in (1, 4):
        mla_decode.merge(mla_decode.mla_decode(q_latent, q[..., 128:], pool, tables, lens, 0.1, splits), q.dtype)
    if num == 1:
        latent.absorb_few(q, kv_b, 128)
        latent.merge_expand(*mla_decode.mla_decode(q_latent, q[..., 128:], pool, tables, lens, 0.1, 64), kv_b, 128, out)
    mla_mixed.mla_mixed(q_latent, q[..., 128:], pool, tables, lens, starts, (lens, lens), 0.1)
    expanded = torch.zeros(num, heads, 256, dtype=torch.bfloat16)
    latent.build_keys(expanded, kv, 128, 512)
    tiles, tile = torch.zeros(3, 1, dtype=torch.int32), mla_prefill.choose_tile(torch.bfloat16)
    mla_prefill.mla_prefill(out, q, expanded, kv[:, 512:], starts, lens, tiles, 0.1, tile)
q, rope, pool = torch.zeros(64, 128, 512), torch.zeros(64, 128, 64), torch.zeros(8, 64, 576)
mla_decode.mla_decode(q, rope, pool, tables, lens, 0.1, 1)  # in float32 a tile has to be smaller
elementwise.norm(torch.zeros(2, 1536, dtype=torch.bfloat16), torch.zeros(1536, dtype=torch.bfloat16), 1e-6)
for name in ("_gemv", "_skinny"):
    setattr(linear, name, Recorder(getattr(linear, name)))
for rows, outputs, size in (
    *((1, 1024, 2048), (2, 6144, 4096), (1, 4096, 1024), (4, 3648, 2048), (5, 1024, 3072), (33, 2048, 10944), (64, 5632, 2048)),
    *((96, 6144, 1024), (128, 28672, 2048)),
):
    x, w = torch.zeros(rows, size, dtype=torch.bfloat16), torch.zeros(outputs, size, dtype=torch.bfloat16)
    linear.linear(x, w, x[0])  # of the bias, only its type counts here
    linear.gated(x, w)
    linear.add_linear(torch.zeros(rows, outputs, dtype=torch.bfloat16), x, w)
    if rows == 1:
        linear.linear(x, w, norm=(x[0], 1e-6))
        linear.gated(x, w, norm=(x[0], 1e-6))
for module, names in (
    (routing, ("_logits", "_route", "_count", "_sort")),
    (experts, ("_few_up", "_few_down", "_tiles_up", "_tiles_down", "_spread", "_add_weighted")),
):
    for name in names:
        setattr(module, name, Recorder(getattr(module, name)))
routing_of = {
    "deepseek-v2-lite": RoutingSpec(num_experts=64, top_k=6),
    "qwen3-moe": RoutingSpec(num_experts=128, top_k=8, normalize=True),
    "deepseek-v3": RoutingSpec(num_experts=256, top_k=8, method="noaux_tc", n_group=8, topk_group=4, normalize=True, scale=2.5),
}
meta, bf16 = torch.device("meta"), torch.bfloat16
for name, hidden_size, size, shared_size, router_dtype in (
    ("deepseek-v2-lite", 2048, 1408, 2816, torch.float32),
    ("qwen3-moe", 2048, 768, 0, bf16),
    ("deepseek-v3", 7168, 2048, 2048, torch.float32),
):
    spec = routing_of[name]
    moe = MoeMlp(spec, hidden_size, size, shared_size=shared_size, router_dtype=router_dtype, dtype=bf16, device=meta)
    for tokens in (1, 64):
        x = torch.empty(tokens, hidden_size, dtype=bf16, device=meta)
        routed = moe_cuda.route(moe, x)
    if name == "deepseek-v2-lite":
        moe_cuda.run_few(x, moe, x, routed, moe_cuda.STRIPS)
        for _, cut in moe_cuda.CUTS:
            moe_cuda.run_cut(x, moe, x, routed, cut, PlainOps())
        experts.spread(x, torch.zeros(tokens * spec.top_k, dtype=torch.int32))
    for tokens in (1, 8192):  # of the one part, and of many
        routing.sort_pairs(torch.zeros(tokens, spec.top_k, dtype=torch.int32), spec.num_experts, 128)
for module, names in ((sample, ("_likeliest",)), (draw, ("_survey", "_finish"))):
    for name in names:
        setattr(module, name, Recorder(getattr(module, name)))
rows, numbers = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.float64)
for dtype in (torch.bfloat16, torch.float32):
    logits = torch.zeros(2, 151936, dtype=dtype)
    tokens = sample.choose_likeliest(logits, rows, slots)
    draw.draw(logits, rows, slots, tokens, numbers, draw.DrawParams(numbers, numbers, numbers, numbers))
for name in ("_gather_decodes", "_gather_mixed"):
    setattr(step_inputs, name, Recorder(getattr(step_inputs, name)))
step_inputs.gather_decodes(rows, rows, slots, tables, 64)
step_inputs.gather_mixed(rows, rows, rows, rows, rows, slots, tables, 64)
paged_prefill._map_tiles = Recorder(paged_prefill._map_tiles)
paged_prefill.map_tiles(starts, 512, 64, least=2)
sys.stdout.write("compiled\n")
