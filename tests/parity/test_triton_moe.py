"""Tests the kernels of a mixture of experts against their plain twins, `route` and `run_experts` of `layers/moe.py`."""

from __future__ import annotations

import pytest
import torch

from engine.kernels import routing, sort_pairs
from engine.kernels.experts_few import Strip
from engine.kernels.experts_tiles import Tile
from engine.layers import moe_cuda
from engine.layers.kinds import RoutingSpec
from engine.layers.moe import MoeMlp, Routed, route, run_experts
from engine.layers.moe_cuda import Cut
from engine.layers.ops import PlainOps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAIN = PlainOps()
SPECS = [
    RoutingSpec(num_experts=6, top_k=2),
    RoutingSpec(num_experts=8, top_k=3, normalize=True, scale=0.5),
    RoutingSpec(num_experts=12, top_k=3, method="group_limited_greedy", n_group=3, topk_group=2, scale=2.0),
    RoutingSpec(num_experts=12, top_k=5, method="noaux_tc", n_group=4, topk_group=2, normalize=True, scale=2.5),
    RoutingSpec(num_experts=10, top_k=1, method="noaux_tc", n_group=1, topk_group=1),
]
TILE = Tile(rows=16, columns=32, num_warps=4, num_stages=2, programs=1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(DEVICE)


def choose(parts: torch.Tensor, spec: RoutingSpec, bias: torch.Tensor | None, dtype: torch.dtype = torch.float32):
    return routing.route(
        parts,
        bias,
        method=spec.method,
        top_k=spec.top_k,
        groups=(spec.n_group, spec.topk_group),
        normalize=spec.normalize,
        scale=spec.scale,
        router_dtype=dtype,
    )


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("tokens", [1, 19])
def test_router_logits(tokens, exact):
    half = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # Triton's interpreter cannot multiply bfloat16
    x, router = random(tokens, 300).to(half), random(20, 300)
    router = router if exact else router.to(half)
    parts = routing.router_logits(x, router)
    assert parts.shape[0] == 3  # the 300 numbers of a row are cut into splits of 128
    torch.testing.assert_close(parts.sum(0), x.float() @ router.float().T, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.method}-{s.num_experts}")
def test_route_equals_its_twin(spec, biased):
    bias = random(spec.num_experts) / 4 if biased and spec.method == "noaux_tc" else None
    parts = random(3, 7, spec.num_experts)
    weights, ids = route(parts.sum(0), spec, bias)
    found_weights, found_ids = choose(parts, spec, bias)
    assert torch.equal(found_ids.long(), ids)
    torch.testing.assert_close(found_weights, weights)


def test_route_rounds_like_a_bfloat16_router_and_takes_the_lowest_of_equals():
    logits = torch.tensor([[[0.5, 1.0, 1.0 + 2**-10, 0.25, 1.0]]], device=DEVICE)
    spec = RoutingSpec(num_experts=5, top_k=2)
    assert choose(logits, spec, None)[1].tolist() == [[2, 1]]
    assert choose(logits, spec, None, torch.bfloat16)[1].tolist() == [[1, 2]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_expert_ids_are_valid_even_for_nan_and_infinite_logits():
    logits = torch.full((1, 2, 5), float("nan"), device=DEVICE)
    logits[0, 1] = float("-inf")
    ids = choose(logits, RoutingSpec(num_experts=5, top_k=3), None)[1]
    assert ((ids >= 0) & (ids < 5)).all()


def assert_sorted(ids: torch.Tensor, num_experts: int, block: int, shared: int, part: sort_pairs.Part | None) -> None:
    found = sort_pairs.sort_pairs(ids.int(), num_experts, block, shared, part=part)
    pairs, order = ids.numel(), ids.flatten().argsort(stable=True)
    assert torch.equal(found.order.long(), order)
    assert torch.equal(found.place.long()[order], torch.arange(pairs, device=DEVICE))
    counts = [*ids.flatten().bincount(minlength=num_experts).tolist(), *[ids.shape[0]] * shared]
    ends = torch.tensor(counts).cumsum(0)
    assert found.ends.tolist() == ends.tolist()
    blocks = [(e, int(ends[e]) - n + start) for e, n in enumerate(counts) for start in range(0, n, block)]
    num = int(found.num_blocks)
    assert list(zip(found.block_expert[:num].tolist(), found.block_start[:num].tolist(), strict=True)) == blocks


@pytest.mark.parametrize("part", [None, sort_pairs.Part(64, 1), sort_pairs.Part(128, 2)], ids=str)
@pytest.mark.parametrize(("tokens", "num_experts", "shared"), [(1, 6, 0), (7, 6, 2), (64, 8, 0), (160, 5, 1), (90, 40, 0)])
def test_sorted_pairs(tokens, num_experts, shared, part):
    assert_sorted(random(tokens, num_experts).topk(2).indices, num_experts, 16, shared, part)


@pytest.mark.parametrize("pairs", [*(p.pairs + more for p in sort_pairs.ONE_PART for more in (0, 1))])
def test_sorted_pairs_at_the_sizes_of_a_part(pairs):
    assert_sorted(random(pairs, 4).topk(1).indices, 4, 128, 1, None)


@pytest.mark.parametrize("part", [None, sort_pairs.Part(64, 1)], ids=str)
@pytest.mark.parametrize("expert", [0, 2, 4])
def test_sorted_pairs_that_all_have_one_expert(expert, part):
    assert_sorted(torch.full((150, 1), expert, device=DEVICE), 5, 32, 0, part)


def mixture(shared_size: int, size: int = 24, hidden: int = 40) -> MoeMlp:
    spec = RoutingSpec(num_experts=5, top_k=2, normalize=True, scale=1.5)
    moe = MoeMlp(spec, hidden, size, shared_size=shared_size, router_dtype=torch.float32, dtype=torch.float32, device=DEVICE)
    for i, weight in enumerate(moe.parameters()):
        weight.data = random(*weight.shape, seed=i) / 4
    return moe


def plain(moe: MoeMlp, x: torch.Tensor, routed: Routed) -> torch.Tensor:
    """Add the output of the plain experts to a residual stream of ones, and return the stream."""
    out = 1 + run_experts(x, Routed(routed.weights, routed.ids.long()), moe.gate_up, moe.down, PLAIN)
    if moe.shared is not None:
        moe.shared.add_to(out, x, PLAIN)
    return out


def routed_of(tokens: int) -> Routed:
    return Routed(random(tokens, 2).abs(), random(tokens, 5).topk(2).indices.int())


@pytest.mark.parametrize("shared_size", [0, 48])
@pytest.mark.parametrize("columns", [16, 8])
def test_few_tokens_equal_plain_experts(shared_size, columns):
    moe, x, routed = mixture(shared_size), random(2, 40), routed_of(2)
    strip = Strip(rows=16, columns=columns, num_warps=1)
    out = torch.ones_like(x)
    moe_cuda.run_few(out, moe, x, routed, (strip, strip))
    torch.testing.assert_close(out, plain(moe, x, routed))


@pytest.mark.parametrize("with_shared", [True, False])
@pytest.mark.parametrize(("tokens", "shared_size"), [(1, 48), (23, 48), (23, 36), (23, 0)])
def test_blocks_of_pairs_equal_plain_experts(tokens, shared_size, with_shared):
    moe, x, routed = mixture(shared_size), random(tokens, 40), routed_of(tokens)
    cut = Cut(block=16, gate_up=TILE, down=TILE, with_shared=with_shared)
    out = torch.ones_like(x)
    moe_cuda.run_cut(out, moe, x, routed, cut, PLAIN)
    torch.testing.assert_close(out, plain(moe, x, routed))


def test_blocks_of_pairs_with_sizes_that_tiles_divide():
    moe, x, routed = mixture(64, size=32, hidden=64), random(9, 64), routed_of(9)
    cut = Cut(block=16, gate_up=TILE, down=TILE, with_shared=True)
    out = torch.ones_like(x)
    moe_cuda.run_cut(out, moe, x, routed, cut, PLAIN)
    torch.testing.assert_close(out, plain(moe, x, routed))


@pytest.mark.parametrize("shared_size", [0, 32])
def test_grouped_products_equal_plain_experts(shared_size):
    moe, routed = mixture(shared_size, size=32, hidden=64).bfloat16(), routed_of(19)
    x = random(19, 64).bfloat16()
    out = torch.ones_like(x)
    moe_cuda.run_grouped(out, moe, x, routed, PLAIN)
    torch.testing.assert_close(out, plain(moe, x, routed), atol=0.03, rtol=0.03)


@pytest.mark.parametrize("tokens", [1, 6])
def test_a_layer_adds_its_experts_to_the_stream(tokens, monkeypatch):
    monkeypatch.setattr(moe_cuda, "FEW_TOKENS", 1)
    monkeypatch.setattr(moe_cuda, "STRIPS", (Strip(16, 16, 1), Strip(16, 16, 1)))
    monkeypatch.setattr(moe_cuda, "CUTS", ((10, Cut(16, TILE, TILE, with_shared=True)),))
    moe, hidden, norm = mixture(24), random(tokens, 40), (random(40), 1e-6)
    expected = hidden.clone()
    moe(expected, norm, PLAIN)
    moe_cuda.add_to(hidden, moe, PLAIN.norm(hidden, *norm), PLAIN)
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
