"""Tests the kernels that choose tokens against their plain twins, torch's argmax and `sampling/choose.py`."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from engine.batch import Uploader
from engine.kernels import sample_filtered as kernel
from engine.kernels.argmax import VOCAB_TILE, argmax_tokens
from engine.kernels.sample_filtered import SampleParams, sample_filtered
from engine.plan import AdmittedRow
from engine.request import SamplingParams
from engine.sampling.choose import Choice, choose
from engine.sampling.cuda_sampler import CudaSampler
from engine.sampling.sampler import Sampler

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("vocab", [70, VOCAB_TILE, 2 * VOCAB_TILE + 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax(vocab, dtype):
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    logits[1, vocab - 1] = 50.0
    logits[2, [3, vocab // 2, vocab - 2]] = 60.0  # of equal logits the first index wins
    rows = torch.tensor([6, 0, 2, 5, 1], dtype=torch.int32, device=DEVICE)
    latest = torch.full((8,), 99, dtype=torch.int64, device=DEVICE)
    for _ in range(2):  # the second run fails if the first left its arrival counters changed
        tokens = argmax_tokens(logits, rows, latest)
        assert tokens.tolist() == logits.float().argmax(-1).tolist()
        assert tokens[2] == 3
        assert latest[rows.long()].tolist() == tokens.tolist()
        assert latest[[3, 4, 7]].tolist() == [99, 99, 99]


def sampled(logits, uniform, *, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """Sample from logits [N, V] with uniform [N] float64. Returns (tokens of the kernels, tokens of the plain twin)."""
    num, vocab = logits.shape
    columns = [
        torch.full((num,), float(x), dtype=torch.float64, device=DEVICE) for x in (temperature, top_k or vocab, top_p, min_p)
    ]
    rows = torch.arange(num, dtype=torch.int32, device=DEVICE).flip(0)
    latest = torch.zeros(num, dtype=torch.int64, device=DEVICE)
    tokens = argmax_tokens(logits, rows, latest)
    sample_filtered(logits, rows, latest, tokens, uniform, SampleParams(*columns))
    assert latest.flip(0).tolist() == tokens.tolist()
    kept = None if top_k is None and top_p == 1.0 else torch.arange(num, device=DEVICE)
    expected = choose(logits.float(), Choice(uniform, *columns), kept, top_k or vocab)
    return tokens.tolist(), expected.tolist()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Make the kernels' sizes small, so that a row has several tiles, and a tile several groups and more tokens than slots."""
    for name, size in (("LOGITS_TILE", 64), ("GROUP", 8), ("SLOTS", 16), ("_PACKED", 8), ("MARKS", 8)):
        monkeypatch.setattr(kernel, name, size)


SETTINGS = [
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 7},
    {"top_p": 0.6},
    {"top_p": 1e-9},
    {"top_p": 0.0},
    {"top_k": 5, "top_p": 0.0, "min_p": 1.0},
    {"min_p": 0.2},
    {"top_k": 20, "top_p": 0.8, "temperature": 2.0, "min_p": 0.01},
    {"top_p": 0.99},
    {"top_k": 100, "top_p": 0.99},
    {"temperature": 1e-30},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampled_tokens_equal_those_of_the_twin(settings, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(6, 150, generator=generator) * 3).to(DEVICE, dtype)
    uniform = torch.rand(6, generator=generator, dtype=torch.float64).to(DEVICE)
    uniform[0], uniform[1] = 0.0, 1 - 2.0**-53
    found, expected = sampled(logits, uniform, **settings)
    assert found == expected


@pytest.mark.parametrize("sign", [1, -1])
def test_ties_at_the_last_place_of_top_k(sign):
    """All tokens tied at place k pass top_k. But top_p counts only as many of the tied tokens as fill the k places."""
    logits = torch.full((6, 100), sign * 2.0, device=DEVICE, dtype=torch.bfloat16)
    logits[:, 10] = sign * 2.0 + 1.0
    uniform = torch.tensor(np.linspace(0.0, 0.99, 6), device=DEVICE)
    for settings in ({"top_k": 3}, {"top_k": 3, "top_p": 0.5}, {"top_k": 3, "top_p": 0.7}):
        found, expected = sampled(logits, uniform, **settings)
        assert found == expected


def test_rows_without_a_temperature_keep_the_argmax_token():
    logits = torch.randn(3, 90, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found, _ = sampled(logits, torch.full((3,), 0.9, dtype=torch.float64, device=DEVICE), temperature=0.0001)
    zeros = torch.zeros(3, dtype=torch.float64, device=DEVICE)
    rows, latest = torch.arange(3, dtype=torch.int32, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    tokens = argmax_tokens(logits, rows, latest)
    sample_filtered(logits, rows, latest, tokens, zeros + 0.9, SampleParams(zeros, zeros + 5, zeros + 0.5, zeros))
    assert tokens.tolist() == found == logits.argmax(-1).tolist()


def test_a_sampler_with_kernels_chooses_the_tokens_of_one_without():
    rng = random.Random(0)
    upload = Uploader(DEVICE)
    options = {"max_rows": 9, "vocab_size": 150, "eos_token_ids": [1], "device": DEVICE, "upload": upload}
    plain, fast = Sampler(**options), Sampler(**options)
    plain._cuda, fast._cuda = None, CudaSampler(9, DEVICE, upload)
    admitted = [
        AdmittedRow(
            row=row,
            tokens=[3, 4, 5],
            num_prompt=3,
            blocks=[],
            seed=row,
            params=SamplingParams(
                temperature=rng.choice([0.0, 0.7, 1.3]),
                top_p=rng.choice([1.0, 0.7]),
                top_k=rng.choice([0, 20]),
                min_p=rng.choice([0.0, 0.05]),
                repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
                min_tokens=rng.choice([0, 0, 2]),
                bad_words=rng.choice([(), ((5,), (9, 9))]),
                allowed_token_ids=rng.choice([None, (5, 9, 40, 41)]),
            ),
        )
        for row in (8, 2, 5, 0, 7, 1)
    ]
    plain.admit(admitted)
    fast.admit(admitted)
    rows = np.array([7, 0, 8, 2, 5, 1])
    for step in range(2):
        ends = np.full(6, 3 + step)
        logits = torch.randn(6, 150, generator=torch.Generator().manual_seed(step)).to(DEVICE) * 2
        for which in (np.arange(6), np.array([3]), np.array([1, 4])):
            on_device = torch.from_numpy(which).to(DEVICE)
            found = [s.sample(logits[on_device], rows[which], ends[which]).tokens.tolist() for s in (fast, plain)]
            assert found[0] == found[1]


def test_greedy_rows_of_half_precision_are_chosen_on_the_device(monkeypatch):
    upload = Uploader(DEVICE)
    sampler = Sampler(max_rows=3, vocab_size=150, eos_token_ids=[1], device=DEVICE, upload=upload)
    sampler._cuda = CudaSampler(3, DEVICE, upload)
    params = SamplingParams(temperature=0.0)
    sampler.admit([AdmittedRow(row=row, tokens=[3], num_prompt=1, blocks=[], seed=0, params=params) for row in (0, 2)])
    logits = torch.randn(2, 150, generator=torch.Generator().manual_seed(0)).to(DEVICE).half()
    expected = logits.argmax(-1).tolist()
    monkeypatch.setattr(torch.Tensor, "argmax", None, raising=False)
    assert sampler.sample(logits, np.array([2, 0]), np.array([1, 1])).tokens.tolist() == expected
