"""Layers compared with plain implementations of the same formulas."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from engine.layers.kinds import RopeSpec, RoutingSpec
from engine.layers.linear import linear
from engine.layers.moe import route, run_experts
from engine.layers.ops import PlainOps
from engine.layers.rotary import Rotary, deinterleave, rotate
from engine.quant import fp8

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [0, 1, 5, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_equals_its_plain_twin(rows, bias):
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, 48, generator=generator), torch.randn(33, 48, generator=generator)
    b = torch.randn(33, generator=generator) if bias else None
    torch.testing.assert_close(linear(x, weight, b), F.linear(x, weight, b))
    wide = torch.randn(rows, 96, generator=generator)[:, ::2]  # not contiguous
    torch.testing.assert_close(linear(wide, weight, b), F.linear(wide, weight, b))


def test_rotation_of_pairs_is_a_complex_product():
    spec = RopeSpec(theta=100.0, dim=8, interleaved=True)
    x, positions = torch.randn(5, 3, 8), torch.tensor([0, 1, 7, 100, 3])
    angles = positions[:, None].double() * 100.0 ** (-torch.arange(0, 8, 2).double() / 8)
    pairs = torch.view_as_complex(x.double().view(5, 3, 4, 2))
    rotated = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    wanted = torch.cat((rotated.real, rotated.imag), -1).float()
    torch.testing.assert_close(rotate(deinterleave(x), *Rotary(spec, device=CPU)(positions)), wanted, atol=1e-5, rtol=1e-5)


def test_rotation_keeps_the_type_of_its_input():
    cos, sin = Rotary(RopeSpec(theta=100.0, dim=8), device=CPU)(torch.arange(4))
    assert rotate(torch.randn(4, 2, 8, dtype=torch.bfloat16), cos, sin).dtype == torch.bfloat16


def test_each_expert_computes_the_tokens_that_are_routed_to_it():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 16, generator=generator)
    gate_up, down = torch.randn(6, 2 * 8, 16, generator=generator), torch.randn(6, 16, 8, generator=generator)
    weights, ids = route(torch.randn(9, 6, generator=generator), RoutingSpec(num_experts=6, top_k=2))
    wanted = torch.zeros_like(x)
    for t in range(9):
        for w, e in zip(weights[t], ids[t], strict=True):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            wanted[t] += w * (down[e] @ (F.silu(gate) * up))
    torch.testing.assert_close(run_experts(x, (weights, ids), gate_up, down, PlainOps()), wanted, atol=1e-4, rtol=1e-4)


def test_the_routing_bias_decides_the_experts_but_not_their_weights():
    spec = RoutingSpec(num_experts=4, top_k=1, method="noaux_tc", n_group=2, topk_group=1, scale=2.0)
    logits, bias = torch.tensor([[3.0, 2.0, 1.0, 0.0]]), torch.tensor([0.0, 0.0, 0.0, 10.0])
    weights, ids = route(logits, spec, bias)
    assert ids.tolist() == [[3]]
    assert weights.tolist() == [[1.0]]  # 2 * sigmoid(0)


def test_routing_by_the_two_best_of_a_group_excludes_a_good_expert_among_bad_ones():
    logits = torch.tensor([[5.0, -9.0, -9.0, 4.0, 4.0, 4.0]])
    by_best = RoutingSpec(num_experts=6, top_k=1, method="group_limited_greedy", n_group=2, topk_group=1)
    by_two = RoutingSpec(num_experts=6, top_k=1, method="noaux_tc", n_group=2, topk_group=1)
    assert route(logits, by_best)[1].tolist() == [[0]]
    assert route(logits, by_two)[1].item() >= 3


def test_fp8_blocks_may_be_cut_off_at_the_edges_of_a_matrix():
    weight = torch.randn(5, 7).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    found = fp8.dequantize(weight, scale, (4, 3))
    assert fp8.scale_shape((5, 7), (4, 3)) == (2, 3)
    for i in range(5):
        for j in range(7):
            assert found[i, j] == weight.float()[i, j] * scale[i // 4, j // 3]
