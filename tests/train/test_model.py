"""Tests the training model, and that the engine computes the same logits from its exported checkpoint."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import TINY_DRAFT, TINY_TIDEPOOL, VOCAB, make, make_odd

from engine.models import registry
from engine.models.families import parse_spec
from engine.weights import loader
from tests.model.paged import PagedRun, random_sequences
from train import export
from train.model import active_parameters, cross_entropy, flops_per_token

CONFIGS = {"tidepool": TINY_TIDEPOOL, "draft": TINY_DRAFT}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_engines(name, tmp_path):
    config = CONFIGS[name]
    model = make_odd(config)
    save_file({n: t.contiguous().clone() for n, t in export.checkpoint_tensors(model).items()}, tmp_path / "model.safetensors")
    engine = registry.build(parse_spec(config), dtype=torch.float32, device=torch.device("cpu"))
    loader.load(engine, tmp_path)
    sequences = random_sequences(VOCAB, (9, 40))
    for tokens, logits in zip(sequences, PagedRun(engine, sequences).run(num_decoded=3), strict=True):
        with torch.no_grad():
            hidden, _ = model.hidden(torch.tensor([tokens]))
            wanted = model.logits(hidden)[0]
        assert wanted.abs().max() > 1.0
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0.0)


def test_losses_are_of_the_tokens_one_and_two_ahead():
    """Training tests cannot find targets that are shifted by one token, since a model learns a cycle of tokens whatever the
    shift. So this test calculates the losses of an untrained model."""
    model = make_odd(TINY_TIDEPOOL)
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        losses = model(ids)
        hidden, _ = model.hidden(ids[:, :10])
        guessed, _ = model.second_hidden(hidden, ids[:, 1:11])
        first = model.logits(hidden).log_softmax(-1).gather(-1, ids[:, 1:11, None])
        second = model.logits(guessed).log_softmax(-1).gather(-1, ids[:, 2:12, None])
    torch.testing.assert_close(losses.next_token, -first.mean())
    torch.testing.assert_close(losses.second_token, -second.mean())


def test_a_prediction_sees_nothing_that_is_later():
    model = make_odd(TINY_TIDEPOOL)
    ids = torch.randint(VOCAB, (1, 20), generator=torch.Generator().manual_seed(2))
    changed = ids.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % VOCAB
    with torch.no_grad():
        (a, _), (b, _) = model.hidden(ids), model.hidden(changed)
        torch.testing.assert_close(a[:, :12], b[:, :12])
        assert not torch.allclose(a[:, 12:], b[:, 12:])
        (a, _), (b, _) = model.second_hidden(a[:, :-1], ids[:, 1:]), model.second_hidden(b[:, :-1], changed[:, 1:])
        torch.testing.assert_close(a[:, :11], b[:, :11])
        assert not torch.allclose(a[:, 11:], b[:, 11:])


def test_load_counts_every_choice_of_every_moe_layer():
    model = make(TINY_TIDEPOOL)
    load = model(torch.randint(VOCAB, (3, 18))).load
    assert load.shape == (3, TINY_TIDEPOOL["n_routed_experts"])  # two layers of the trunk and one of the MTP module
    assert load.sum(1).tolist() == [3 * 16 * TINY_TIDEPOOL["num_experts_per_tok"]] * 3


def test_every_parameter_is_trained():
    model = make(TINY_TIDEPOOL)
    losses = model(torch.randint(VOCAB, (4, 34)))
    (losses.next_token + losses.second_token).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_cross_entropy_is_torchs():
    hidden, head, targets = torch.randn(2, 5, 8), torch.randn(11, 8), torch.randint(11, (2, 5))
    wanted = torch.nn.functional.cross_entropy((hidden @ head.T).view(10, 11), targets.view(10))
    torch.testing.assert_close(cross_entropy(hidden, head, targets), wanted)


def test_flops_count_what_a_token_touches():
    """The test counts the draft model's FLOPs by hand: every matrix once, the embedding as the head, and attention over half a
    window on average."""
    model, length = make(TINY_DRAFT), 64
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert active_parameters(model) == matrices
    attention = 2 * 4 * (16 + 16) * length / 2  # layers x heads x (query size + value size) x mean context
    assert flops_per_token(model, length) == 6 * (matrices + attention)
