"""Tests the inputs that kernels gather for a step captured in a CUDA graph, against those that the host builds for the plan."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.batch import Uploader
from engine.device.graph_shapes import MixedBuffers
from engine.device.inputs import Rows, Slices
from engine.kernels.gather_inputs import gather_decodes, gather_mixed
from engine.plan import AdmittedRow, StepPlan
from engine.request import SamplingParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK = 4  # tokens of a KV block
LENS = {4: 7, 0: 1, 2: 1500, 3: 8}  # maps each batch row to the number of its tokens


@pytest.fixture
def rows():
    """Make the state of four batch rows. LENS has the number of tokens of each row, after which comes one sampled token."""
    state = Rows(max_rows=5, max_len=2000, block_size=BLOCK, scratch_block=777, device=DEVICE, upload=Uploader(DEVICE))
    rng = np.random.default_rng(0)
    admitted = [
        AdmittedRow(row, rng.integers(0, 90, n).tolist(), n, rng.integers(0, 700, n // BLOCK + 1).tolist(), SamplingParams(), 0)
        for row, n in LENS.items()
    ]
    state.apply(StepPlan(1, admitted=admitted))
    state.set_latest(torch.arange(5, device=DEVICE), torch.tensor([10, 11, 12, 13, 14], device=DEVICE))
    return state


def expect(rows, slices, num_decodes):
    which, starts, nums = (list(column) for column in zip(*slices, strict=True))
    plan = StepPlan(2, which, starts, nums, num_decodes, list(range(len(slices))))
    return Slices.of(plan), rows.batch(plan, Slices.of(plan), []).batch


def compare(found, expected, tokens, queries):
    for name in ("token_ids", "positions", "slots"):
        assert getattr(found, name)[:tokens].tolist() == getattr(expected, name).tolist(), name
    assert found.kv_lens[:queries].tolist() == expected.kv_lens_host
    for i, n in enumerate(expected.kv_lens_host):
        used = -(-n // BLOCK)
        assert found.block_tables[i, :used].tolist() == expected.block_tables[i, :used].tolist()
    assert set(found.slots[tokens:].tolist()) <= set(range(777 * BLOCK, 778 * BLOCK))


def test_gathered_decodes_equal_those_built_on_the_host(rows):
    _, expected = expect(rows, [(row, n, 1) for row, n in LENS.items()], 4)
    which = torch.tensor([*LENS, rows.state.scratch_row], dtype=torch.int32, device=DEVICE)
    positions = torch.tensor([*LENS.values(), 0], dtype=torch.int32, device=DEVICE)
    found = gather_decodes(which, positions, rows.state.latest, rows.state.tables, BLOCK)
    compare(found, expected, 4, 4)
    assert found.kv_lens[4] == 1


def test_a_gathered_mixed_step_equals_the_one_built_on_the_host(rows):
    slices, expected = expect(rows, [(4, 7, 1), (0, 1, 1), (2, 1000, 300), (3, 2, 6)], 2)
    numbers = np.linspace(0.1, 0.4, 4)
    scratch = rows.state.scratch_row
    packed = MixedBuffers.of(rows.mixed(slices), slices, numbers, key=(320, 6), scratch_row=scratch)
    uniform, tokens, positions, owners, which, lens, starts = packed.parts(torch.from_numpy(packed.values).to(DEVICE))
    assert uniform.tolist() == [*numbers, 0.0, 0.0]
    assert starts.tolist() == [0, 1, 2, 302, 308, 320, 320]
    found = gather_mixed(tokens, positions, owners, which, lens, rows.state.latest, rows.state.tables, BLOCK)
    compare(found, expected, 308, 4)
