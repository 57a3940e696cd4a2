"""Tests that every kernel in the table of `engine/kernels/bench.py` can be launched, at sizes for Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import bench
from engine.kernels.cases import attention, base, experts
from engine.kernels.experts_few import Strip
from engine.layers import moe_cuda

TINY = {
    "seqs": 2,
    "context": 70,
    "chunk": 33,
    "behind": 40,
    "tile": 4,
    "rows": 2,
    "heads": 4,
    "kv_heads": 2,
    "nope": 16,
    "rope": 16,
    "latent": 128,
    "hidden": 32,
    "size": 32,
    "outputs": 32,
    "inputs": 64,
    "vocab": 5000,
    "tokens": 2,
    "experts": 8,
    "block": 16,
    "shared": 1,
    "top_k": 7,
    "top_percent": 90,
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STRIP = experts.STRIP


@pytest.fixture(autouse=True)
def _for_the_interpreter(monkeypatch):
    monkeypatch.setattr(base, "DTYPE", torch.float16)  # Triton's interpreter cannot add in bfloat16
    monkeypatch.setattr(experts, "STRIP", Strip(32, 32, 1))  # gives few programs, which are slow in the interpreter


@pytest.mark.parametrize("case", {case.kernel: case for case in bench.CASES}.values(), ids=lambda case: case.kernel)
def test_each_kernel_runs_and_gives_finite_numbers(case):
    launch = case.make(DEVICE, **{name: TINY[name] for name in case.sizes})
    out = launch.run()
    for tensor in out if isinstance(out, tuple) else (out,):
        assert bool(tensor.isfinite().all())
    assert launch.num_bytes > 0


def test_the_lines_of_one_kernel_differ_only_in_their_sizes():
    assert len({case.kernel for case in bench.CASES}) == len({(case.kernel, case.make, *case.sizes) for case in bench.CASES})
    assert len({(case.kernel, case.shape) for case in bench.CASES}) == len(bench.CASES)


def test_prefill_writes_every_token_and_its_bound_counts_causal_pairs():
    launch = attention.prefill(DEVICE, seqs=2, context=70, heads=4, kv_heads=2)
    assert launch.operations == 4 * 2 * (70 * 71 // 2) * 4 * 128
    query, first, _ = attention._prompt_tiles(DEVICE, 2, 70, 32)
    assert sorted(zip(query.tolist(), first.tolist(), strict=True)) == [
        *([(-1, 0)] * 2),
        *((q, token) for q in range(2) for token in (0, 32, 64)),
    ]


@pytest.mark.parametrize("tokens", [case.sizes["tokens"] for case in bench.CASES if case.kernel.startswith("moe")])
def test_experts_are_launched_with_the_kernels_and_tiles_of_the_layer(tokens):
    kernel = next(case.kernel for case in bench.CASES if case.kernel.startswith("moe") and case.sizes["tokens"] == tokens)
    mean = tokens * experts.TOP_K / 64
    cut = next((cut for most, cut in moe_cuda.CUTS if mean <= most), None)
    if tokens <= moe_cuda.FEW_TOKENS:
        assert (kernel, moe_cuda.STRIPS) == ("moe_few", (STRIP, STRIP))
    elif cut is None:
        assert (kernel, moe_cuda.SORT_BLOCK) == ("moe_grouped", experts.SORT_BLOCK)
    else:
        block, num_shared = experts.cut(tokens, 64)
        assert (kernel, cut) == ("moe_tiles", moe_cuda.Cut(block, experts.TILE, experts.TILE, num_shared > 0))


def test_the_three_ways_to_compute_experts_agree(monkeypatch):
    sizes = {"tokens": 3, "experts": 8, "hidden": 32, "size": 32}

    def run(make, shared):
        torch.manual_seed(1)
        monkeypatch.setattr(experts, "NUM_SHARED", shared)
        return make(DEVICE, **sizes).run().float()

    for shared, other in ((2, experts.tiles), (0, experts.tiles), (0, experts.grouped)):
        found, expected = run(other, shared), run(experts.few, shared)
        assert (found - expected).norm() < 1e-2 * expected.norm()
