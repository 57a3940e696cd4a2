"""Tests the parts of training one by one: windows, plan, optimizer and export."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TINY_DRAFT, TINY_TIDEPOOL, make, plan

from train import distill, export, pretrain
from train.optimizer import make_optimizers, orthogonalize
from train.plan import Phase, Plan, Share
from train.windows import Windows


def test_an_epoch_shows_every_window_once_and_the_next_one_in_another_order():
    windows = Windows(torch.arange(1000), length=16, ahead=2, seed=1)
    first, second = windows.rows(0, windows.num), windows.rows(windows.num, windows.num)
    for rows in (first, second):
        assert rows.shape == (windows.num, 18)
        assert (rows.diff(dim=1) == 1).all()
        begins = rows[:, 0].sort().values
        assert (begins.diff() == 16).all()
    assert not torch.equal(first, second)
    assert windows.num == 61


def test_rows_do_not_depend_on_how_they_are_asked_for():
    windows, again = (Windows(torch.arange(500).to(torch.int16), length=8, ahead=1, seed=3) for _ in range(2))
    whole = windows.rows(0, 150)  # the windows of two epochs and the beginning of a third
    parts = torch.cat([again.rows(100, 50), again.rows(0, 7), again.rows(7, 93)])
    assert torch.equal(whole, torch.cat([parts[50:], parts[:50]]))


def test_a_short_stream_is_refused():
    with pytest.raises(ValueError, match="at least two windows"):
        Windows(torch.arange(40), length=32, ahead=1, seed=0)


def test_the_learning_rate_warms_up_stays_and_decays():
    p = plan(100, warmup=10)
    rates = [p.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(3e-4)
    assert rates[10:65] == [3e-3] * 55
    assert rates[-1] == pytest.approx(3e-3 / 35)
    assert rates == sorted(rates[:50]) + sorted(rates[50:], reverse=True)


def test_phases_begin_where_they_say():
    p = plan(10)
    assert [p.phase(step)[0].length for step in range(10)] == [16] * 5 + [32] * 5
    assert [p.phase(step)[1] for step in (0, 4, 5, 9)] == [0, 0, 5, 5]


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"micro_tokens": 100}, "micro_tokens"), ({"phases": (Phase(0.5, 16),)}, "start at 0"), ({"phases": ()}, "start at 0")],
)
def test_numbers_that_do_not_fit_are_refused(changes, says):
    fields = {"steps": 10, "tokens_per_step": 256, "micro_tokens": 64, "lr": 1e-3, "phases": (Phase(0.0, 16),)}
    with pytest.raises(ValueError, match=says):
        Plan(**(fields | changes))


def test_forwards_are_shared_out_among_devices():
    assert plan(1).share(1) == Share(forwards=4, tokens=64)
    assert plan(1).share(4) == Share(forwards=1, tokens=64)
    assert plan(1).share(8) == Share(forwards=1, tokens=32)
    with pytest.raises(ValueError, match="3 devices"):
        plan(1).share(3)


@pytest.mark.parametrize("default", [pretrain.DEFAULT, distill.DEFAULT])
@pytest.mark.parametrize("num", [1, 2, 4, 8])
def test_the_real_runs_can_be_shared_out(default, num):
    share = default.share(num)
    assert share.forwards * share.tokens * num == default.tokens_per_step


@pytest.mark.parametrize("shape", [(3, 16, 40), (2, 40, 16), (1, 24, 24)])
def test_orthogonalize_keeps_directions_and_evens_sizes(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = orthogonalize(matrices)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    singular = torch.linalg.svdvals(out)
    # Five iterations are too few for singular values near zero, so the lower bound is loose. Values of at least a tenth of the
    # largest one reach the final range.
    assert (singular > 0.3).all()
    assert (singular < 1.25).all()
    overlap = (out * (u @ v)).sum((1, 2)) / (out.norm(dim=(1, 2)) * (u @ v).norm(dim=(1, 2)))
    assert (overlap > 0.97).all()


def test_a_step_of_muon_is_torchs():
    """The test compares this Muon with torch.optim.Muon, matrix by matrix, with the same scaling. The tolerance is wide, since
    torch's version iterates in bfloat16."""
    torch.manual_seed(0)
    model = make(TINY_DRAFT)
    ours, _ = make_optimizers(model, lr=1e-2)
    params = [p for group in ours.param_groups for p in group["params"]]
    twins = [p.detach().clone().requires_grad_() for p in params]
    theirs = torch.optim.Muon(twins, lr=1e-2, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, twin in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            twin.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, atol=2e-3, rtol=0.0)  # a step moves numbers by 2e-3 on average


def test_embedding_norms_and_routers_are_adams():
    model = make(TINY_TIDEPOOL)
    muon, adam = ({id(p) for group in o.param_groups for p in group["params"]} for o in make_optimizers(model, lr=1e-3))
    names = {id(p): name for name, p in model.named_parameters()}
    assert muon | adam == set(names)
    assert not muon & adam
    by_adam = {names[i] for i in adam}
    assert by_adam == {n for n in names.values() if "norm" in n or "embed_tokens" in n or n.endswith("mlp.gate.weight")}


def test_names_and_types_in_fp8_are_those_of_deepseeks_own_files():
    tensors = export.to_fp8(export.to_bfloat16(export.checkpoint_tensors(make(TINY_TIDEPOOL))))
    layer = {name.removeprefix("model.layers.3."): t for name, t in tensors.items() if name.startswith("model.layers.3.")}
    kept = {
        "enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight", "input_layernorm.weight",
        "post_attention_layernorm.weight", "self_attn.q_a_layernorm.weight", "self_attn.kv_a_layernorm.weight", "mlp.gate.weight",
    }  # fmt: skip
    quantized = {f"self_attn.{name}.weight" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
    places = ["shared_experts", *(f"experts.{e}" for e in range(8))]
    quantized |= {f"mlp.{place}.{part}_proj.weight" for place in places for part in ("gate", "up", "down")}
    scales = {name + "_scale_inv" for name in quantized}
    assert set(layer) == kept | quantized | scales | {"mlp.gate.e_score_correction_bias"}
    assert {layer[name].dtype for name in quantized} == {torch.float8_e4m3fn}
    assert {layer[name].dtype for name in scales | {"mlp.gate.e_score_correction_bias"}} == {torch.float32}
    assert {layer[name].dtype for name in kept} == {torch.bfloat16}
    assert {name for name in tensors if not name.startswith("model.layers.")} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
    }
