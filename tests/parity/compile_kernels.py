"""Compiles every kernel for a Hopper GPU at the shapes of real models. No GPU is needed. Prints "compiled" at the end.

`test_triton_compile.py` runs this script in a process of its own, without Triton's interpreter. Each kernel is replaced by a
Recorder, and then launched as the engine launches it: the recorder compiles for the launch's arguments in place of running it.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels import (
    argmax,
    elementwise,
    experts,
    experts_few,
    experts_tiles,
    gather_inputs,
    gemv,
    latent_prepare,
    latent_products,
    launch,
    linear,
    mla_decode,
    mla_mixed,
    mla_prefill,
    paged_decode,
    paged_prefill,
    query_tiles,
    routing,
    sample_filtered,
    skinny,
    sort_pairs,
)
from engine.layers import moe_cuda
from engine.layers.kinds import RoutingSpec
from engine.layers.moe import MoeMlp
from engine.layers.ops import PlainOps

SHARED_MEMORY = 227 << 10  # bytes that a program may use on Hopper
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float64: "*fp64",
}
KERNELS = (
    (argmax, ("_argmax",)),
    (elementwise, ("_norm", "_silu_mul", "_norm_rotate", "_angles")),
    (experts, ("_spread", "_add_weighted")),
    (experts_few, ("_few_up", "_few_down")),
    (experts_tiles, ("_tiles_up", "_tiles_down")),
    (gather_inputs, ("_gather_decodes", "_gather_mixed")),
    (gemv, ("_gemv",)),
    (latent_prepare, ("_prepare",)),
    (latent_products, ("_absorb", "_absorb_few", "_merge_expand", "_build_keys")),
    (mla_decode, ("_split", "_merge")),
    (mla_mixed, ("_attend",)),
    (mla_prefill, ("_prefill",)),
    (paged_decode, ("_decode",)),
    (paged_prefill, ("_prefill",)),
    (query_tiles, ("_map_tiles",)),
    (routing, ("_logits", "_route")),
    (sample_filtered, ("_survey", "_finish")),
    (skinny, ("_skinny",)),
    (sort_pairs, ("_count", "_sort")),
)
BF16, META = torch.bfloat16, torch.device("meta")


def zeros(*shape, dtype=BF16):
    return torch.zeros(shape, dtype=dtype)


def ints(*shape):
    return zeros(*shape, dtype=torch.int32)


class Recorder:
    """Takes a kernel's place: `recorder[grid](...)` compiles what `kernel[grid](...)` would have launched."""

    def __init__(self, kernel):
        self._kernel = kernel

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
        assert compiled.metadata.shared <= SHARED_MEMORY, f"{names}: {compiled.metadata.shared} bytes of shared memory"


def kind(value):
    """Triton's name for the type of an argument."""
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def replace_kernels():
    launch._has_pdl = lambda device: True
    for module, names in KERNELS:
        for name in names:
            setattr(module, name, Recorder(getattr(module, name)))


TABLES, LENS = ints(2, 4), torch.ones(2, dtype=torch.int32)
STARTS = torch.tensor([0, 1, 2], dtype=torch.int32)


def attention():
    for heads, kv_heads, head, dtype in (
        (28, 4, 128, BF16),
        (24, 8, 128, BF16),
        (40, 8, 128, BF16),
        (16, 8, 256, BF16),
        (32, 8, 128, torch.float32),
    ):
        q, cache = zeros(2, heads, head, dtype=dtype), zeros(8, 64, kv_heads, head, dtype=dtype)
        paged_prefill.paged_prefill(q, cache, cache, TABLES, LENS, STARTS, (LENS, LENS), 0.1, q)
        for splits in (1, 2, 4, 8):
            paged_decode.paged_decode(q, cache, cache, TABLES, LENS, 0.1, splits)
        many = zeros(2 * paged_decode.MANY_PROGRAMS, heads, head, dtype=dtype)  # so many that a GPU splits nothing
        paged_decode.paged_decode(many, cache, cache, TABLES, LENS, 0.1, 1)
    query_tiles.map_tiles(STARTS, 512, 64, least=2)


def small_operations():
    hidden, weight = zeros(2, 2048), zeros(2048)
    elementwise.silu_mul(hidden)
    elementwise.norm(zeros(2, 1536), zeros(1536), 1e-6)
    qkv, angle, slots = zeros(2, 32, 128), zeros(2, 1, 128, dtype=torch.float32), zeros(2, dtype=torch.int64)
    pools = {name: zeros(4, 64, 8, 128) for name in ("k", "v")}
    elementwise.norm_rotate(qkv, (angle, angle), (weight, weight), 1e-6, slots, pools)
    elementwise.angles(slots, zeros(64, dtype=torch.float32), 1.0)


def latent_attention():
    for heads, num in ((16, 1), (16, 256), (128, 64)):
        q, kv, kv_b, pool = zeros(num, heads, 192), zeros(num, 576), zeros(heads, 256, 512), zeros(8, 64, 576)
        angle, slots, out = zeros(num, 1, 64, dtype=torch.float32), zeros(num, dtype=torch.int64), zeros(num, heads, 128)
        latent_prepare.latent_prepare(q, kv, (kv_b[0, 0], 1e-6), (angle, angle), slots, pool, interleaved=True)
        q_latent, q_rope = latent_products.absorb(q, kv_b, 128), q[..., 128:]
        for splits in (1, 4):
            mla_decode.merge(mla_decode.mla_decode(q_latent, q_rope, pool, TABLES, LENS, 0.1, splits), q.dtype)
        if num == 1:
            latent_products.absorb_few(q, kv_b, 128)
            parts = mla_decode.mla_decode(q_latent, q_rope, pool, TABLES, LENS, 0.1, 64)
            latent_products.merge_expand(*parts, kv_b, 128, out)
        mla_mixed.mla_mixed(q_latent, q_rope, pool, TABLES, LENS, STARTS, (LENS, LENS), 0.1)
        expanded = zeros(num, heads, 256)
        latent_products.build_keys(expanded, kv, 128, 512)
        tiles, tile = ints(3, 1), mla_prefill.choose_tile(BF16)
        mla_prefill.mla_prefill(out, q, expanded, kv[:, 512:], STARTS, LENS, tiles, 0.1, tile)
    # In float32 a tile has to be smaller.
    q, rope, pool = (zeros(*shape, dtype=torch.float32) for shape in ((64, 128, 512), (64, 128, 64), (8, 64, 576)))
    mla_decode.mla_decode(q, rope, pool, TABLES, LENS, 0.1, 1)


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
        linear.linear(x, w, x[0])  # only the type of the bias matters here
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
        for tokens in (1, 8192):  # one part, and many parts
            sort_pairs.sort_pairs(ints(tokens, spec.top_k), spec.num_experts, 128)


def ends_of_a_step():
    rows, numbers, latest = ints(2), zeros(2, dtype=torch.float64), zeros(2, dtype=torch.int64)
    for dtype in (BF16, torch.float32):
        logits = zeros(2, 151936, dtype=dtype)
        tokens = argmax.argmax_tokens(logits, rows, latest)
        params = sample_filtered.SampleParams(numbers, numbers, numbers, numbers)
        sample_filtered.sample_filtered(logits, rows, latest, tokens, numbers, params)
    gather_inputs.gather_decodes(rows, rows, latest, TABLES, 64)
    gather_inputs.gather_mixed(rows, rows, rows, rows, rows, latest, TABLES, 64)


if __name__ == "__main__":
    replace_kernels()
    for compile_all in (attention, small_operations, latent_attention, products, mixtures, ends_of_a_step):
        compile_all()
    sys.stdout.write("compiled\n")
