"""Every step has a graph of a fitting shape, and the array that is uploaded for it holds the step and harmless padding."""

import numpy as np
import pytest

from engine.device.graph_shapes import ALIGN, TOKENS, DecodeBuffers, GraphSizes, MixedBuffers
from engine.device.inputs import Slices
from engine.plan import StepPlan

SCRATCH = 99


@pytest.mark.parametrize("max_rows", [1, 3, 16, 64, 100, 256, 1000])
def test_every_step_of_decodes_has_a_graph(max_rows):
    sizes = GraphSizes.of(max_rows, 0)
    for num in range(1, max_rows + 1):
        size, queries = sizes.decode(num)
        assert num <= size <= max_rows
        assert queries == 0
    assert sizes.mixed(1, 1) is None
    assert len(set(sizes.all_keys())) == len(sizes.all_keys())


@pytest.mark.parametrize("max_rows", [1, 3, 16, 64, 100, 256])
def test_every_mixed_step_up_to_the_largest_has_a_graph_among_all_keys(max_rows):
    sizes = GraphSizes.of(max_rows, 1024)
    keys = set(sizes.all_keys())
    for tokens in range(1, 1025):
        for queries in {1, min(tokens, max_rows), min(tokens, 15), min(tokens, 16)}:
            if queries <= max_rows:
                key = sizes.mixed(tokens, queries)
                assert key in keys
                assert key[0] >= tokens
                assert key[1] > queries  # one query holds the padding tokens
                assert key[1] % ALIGN == 0
    assert sizes.mixed(1025, 1) is None
    assert max(tokens for tokens, queries in keys if queries) == 1024 < TOKENS[-1]


def test_decodes_are_padded_with_the_scratch_row():
    packed = DecodeBuffers.of(np.array([4, 2]), np.array([70, 8]), np.array([0.25, 0.5]), size=3, scratch_row=SCRATCH)
    uniform, rows, positions = packed.parts(packed.values)
    assert uniform.tolist() == [0.25, 0.5, 0.0, 0.0]
    assert rows.tolist() == [4, 2, SCRATCH, SCRATCH]
    assert positions.tolist() == [70, 8, 0, 0]


def test_the_padding_tokens_of_a_mixed_step_are_one_more_query():
    slices = Slices.of(StepPlan(1, [4, 2], [7, 0], [1, 3], 1, [0, 1]))
    tokens = (np.array([-1, 5, 6, 7]), np.array([7, 0, 1, 2]), np.array([4, 2, 2, 2]))
    packed = MixedBuffers.of(tokens, slices, np.array([0.5, 0.75]), key=(8, 4), scratch_row=SCRATCH)
    uniform, ids, positions, owners, rows, kv_lens, starts = (part.tolist() for part in packed.parts(packed.values))
    assert uniform == [0.5, 0.75, 0.0, 0.0]
    assert ids == [-1, 5, 6, 7, 0, 0, 0, 0]
    assert positions == [7, 0, 1, 2, 0, 1, 2, 3]
    assert owners == [4, 2, 2, 2, *[SCRATCH] * 4]
    assert rows == [4, 2, SCRATCH, SCRATCH]
    assert kv_lens == [8, 3, 4, 1]
    assert starts == [0, 1, 4, 8, 8]
