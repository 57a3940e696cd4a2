"""Tests that the sampling kernels give NO_TOKEN to a row whose logits are not finite, and tokens to the batch's other rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.batch import Uploader
from engine.plan import NO_TOKEN, AdmittedRow
from engine.request import SamplingParams
from engine.sampling.cuda_sampler import CudaSampler
from engine.sampling.rows import RowParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 4096 + 900  # logits of a row, which the kernels read in two tiles
ROWS = 6  # batch rows; the scratch row follows, with index 6
INF, NAN = float("inf"), float("nan")

SETTINGS = [
    {"temperature": 0.0},
    {},
    {"top_k": 20, "top_p": 0.8, "temperature": 2.0, "min_p": 0.01},
]


def sampler(settings) -> CudaSampler:
    upload = Uploader(DEVICE)
    params, found = RowParams(ROWS, VOCAB, []), CudaSampler(ROWS, DEVICE, upload)
    for row in range(ROWS):
        params.admit(AdmittedRow(row, [0], 1, [], SamplingParams(**settings), row))
    found.admit(params, np.arange(ROWS))
    return found


def spoiled(logits: torch.Tensor) -> torch.Tensor:
    """Return a copy of `logits` in which row 1 has a NaN in its second tile, row 3 a +inf in its first, and row 5 only NaN."""
    out = logits.clone()
    out[1, VOCAB - 3] = NAN
    out[3, 17] = INF
    out[5] = NAN
    return out


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_nan_or_infinity_get_no_token_and_leave_the_others_alone(settings, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(6, VOCAB, generator=generator) * 3).to(DEVICE, dtype)
    uniform = torch.rand(6, generator=generator, dtype=torch.float64).to(DEVICE)
    rows = torch.tensor([4, 1, 0, 5, 3, ROWS], dtype=torch.int32, device=DEVICE)
    found = sampler(settings)
    expected = found.sample(logits, rows, torch.zeros(ROWS + 1, dtype=torch.int64, device=DEVICE), uniform).tolist()
    for _ in range(2):  # the second run fails if failed rows left arrival counters changed
        latest = torch.full((ROWS + 1,), 99, dtype=torch.int64, device=DEVICE)
        tokens = found.sample(spoiled(logits), rows, latest, uniform).tolist()
        assert [tokens[i] for i in (0, 2, 4)] == [expected[i] for i in (0, 2, 4)]
        assert [tokens[i] for i in (1, 3, 5)] == [NO_TOKEN] * 3
        assert latest[rows.long()].tolist() == [expected[0], 0, expected[2], 0, expected[4], 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("values", "fails"),
    [({0: NAN}, True), ({0: INF}, True), ({0: -INF}, False), ({0: NAN, 9: INF}, True), ({VOCAB - 1: NAN, 5: -INF}, True)],
    ids=str,
)
def test_argmax_fails_for_nan_and_plus_infinity_alone(values, fails, dtype):
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    for token, value in values.items():
        logits[0, token] = value
    found = sampler({"temperature": 0.0})
    token = int(found.argmax(logits, torch.zeros(1, dtype=torch.int32, device=DEVICE))[0])
    assert token == (NO_TOKEN if fails else int(logits.float().argmax()))


def test_a_row_of_minus_infinity_alone_gets_no_token():
    logits = torch.full((1, VOCAB), -INF, device=DEVICE)
    found = sampler({"temperature": 0.0})
    assert found.argmax(logits, torch.zeros(1, dtype=torch.int32, device=DEVICE)).tolist() == [NO_TOKEN]
