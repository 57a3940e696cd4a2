"""Compiles the attention kernels for a Hopper GPU, which needs none: run by test_triton_compile.py without the interpreter."""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.kernels import mla_decode, paged_decode, paged_prefill


def record(kernel):
    """Stand in for the launcher: compile what would have been launched."""

    def launch(*args, num_warps=4, num_stages=3, grid=None, warmup=False, **constants):
        names = kernel.arg_names
        values = dict(zip(names, args, strict=False))
        signature = {n: kind(v) for n, v in values.items()} | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()})
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps, "num_stages": num_stages})

    return launch


def kind(value):
    if isinstance(value, torch.Tensor):
        return {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


class Recorder:
    def __init__(self, kernel):
        self.launch = record(kernel)

    def __getitem__(self, grid):
        return self.launch


for module, name in ((paged_decode, "_split"), (paged_decode, "_merge"), (paged_prefill, "_prefill"), (mla_decode, "_split")):
    setattr(module, name, Recorder(getattr(module, name)))
tables, lens = torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
starts = torch.tensor([0, 1, 2], dtype=torch.int32)
for heads, kv_heads in ((28, 4), (24, 8), (40, 8)):
    q, cache = torch.zeros(2, heads, 128, dtype=torch.bfloat16), torch.zeros(8, 64, kv_heads, 128, dtype=torch.bfloat16)
    paged_prefill.paged_prefill(q, cache, cache, tables, lens, starts, (lens, lens), 0.1)
    paged_decode.paged_decode(q, cache, cache, tables, lens, 0.1, 4)
for heads in (16, 20):
    q, cache = torch.zeros(2, heads, 576, dtype=torch.bfloat16), torch.zeros(8, 64, 576, dtype=torch.bfloat16)
    mla_decode.mla_decode(q, cache, tables, lens, 0.1, 512, 4)
sys.stdout.write("compiled\n")
