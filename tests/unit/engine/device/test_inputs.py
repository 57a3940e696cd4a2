"""A batch has the tokens, slots and tables of its plan, compared with a plain loop over positions."""

import random

import pytest
import torch

from engine.batch import Uploader
from engine.device.inputs import Rows, Slices
from engine.errors import InternalError
from engine.plan import AdmittedRow, GrownRow, StepPlan
from engine.request import SamplingParams

CPU = torch.device("cpu")


def rows(max_rows=8, max_len=64, block_size=4):
    return Rows(max_rows=max_rows, max_len=max_len, block_size=block_size, scratch_block=999, device=CPU, upload=Uploader(CPU))


def admitted(row, tokens, blocks):
    return AdmittedRow(row=row, tokens=tokens, num_prompt=len(tokens), blocks=blocks, params=SamplingParams(), seed=0)


def plan(slices, *, decodes=0, samples=(), admitted=(), grown=()):
    r, starts, nums = (list(column) for column in zip(*slices, strict=True))
    return StepPlan(0, r, starts, nums, decodes, list(samples), list(admitted), list(grown))


def step(state, p):
    state.apply(p)
    return state.batch(p, Slices.of(p), [])


def test_chunks_take_the_admitted_tokens_and_write_to_the_blocks_of_their_rows():
    r = random.Random(0)
    state = rows()
    tokens = {i: [r.randrange(1000) for _ in range(20)] for i in range(8)}
    blocks = {i: r.sample(range(1000), 5) for i in range(8)}
    slices = [(7, 19, 1), (3, 0, 20), (0, 5, 9), (2, 16, 4)]
    got = step(state, plan(slices, decodes=1, samples=[0, 1, 3], admitted=[admitted(i, tokens[i], blocks[i]) for i in range(8)]))
    where = [(row, p) for row, start, num in slices for p in range(start, start + num)]
    b = got.batch
    assert b.token_ids.tolist() == [tokens[row][p] for row, p in where]
    assert b.positions.tolist() == [p for _, p in where]
    assert b.slots.tolist() == [blocks[row][p // 4] * 4 + p % 4 for row, p in where]
    assert b.query_starts.tolist() == [0, 1, 21, 30, 34]
    assert b.kv_lens.tolist() == b.kv_lens_host == [20, 20, 14, 20]
    assert b.query_lens_host == [1, 20, 9, 4]
    assert b.num_decodes == 1
    assert [table[:n] for table, n in zip(b.block_tables.tolist(), [5, 5, 4, 5], strict=True)] == [
        blocks[7],
        blocks[3],
        blocks[0][:4],
        blocks[2],
    ]
    assert got.sampled_rows.tolist() == [7, 3, 2]
    assert got.last_index.tolist() == [0, 20, 33]
    assert b.read.index.tolist() == [0, 20, 33]
    decodes = b.read.batch
    assert decodes.positions.tolist() == [19, 19, 19]
    assert decodes.slots.tolist() == [b.slots[i] for i in (0, 20, 33)]
    assert decodes.query_starts.tolist() == [0, 1, 2, 3]
    assert decodes.kv_lens.tolist() == decodes.kv_lens_host == [20, 20, 20]
    assert decodes.block_tables.tolist() == [blocks[7], blocks[3], blocks[2]]
    assert (decodes.num_decodes, decodes.query_lens_host, decodes.read) == (3, [1, 1, 1], None)


def test_all_hidden_states_are_read_if_requested_or_if_a_sample_follows_every_token():
    state, first = rows(), plan([(1, 0, 3)], samples=[0], admitted=[admitted(1, [5, 6, 7], [0])])
    state.apply(first)
    assert state.batch(first, Slices.of(first), [], all_read=True).batch.read is None
    assert step(state, plan([(1, 3, 1)], decodes=1, samples=[0])).batch.read is None


def test_no_hidden_state_is_read_of_a_chunk_that_no_sample_follows():
    got = step(rows(), plan([(1, 0, 2)], admitted=[admitted(1, [5, 6, 7], [0])]))
    assert got.batch.read.index.tolist() == []


def test_a_decode_past_the_admitted_tokens_takes_the_latest_sampled_token_of_its_row():
    state = rows()
    first = plan([(1, 0, 3), (4, 0, 4)], samples=[0, 1], admitted=[admitted(1, [5, 6, 7], [0]), admitted(4, [8, 9, 8, 9], [1])])
    state.set_latest(step(state, first).sampled_rows, torch.tensor([70, 71]))
    # Row 1 continues. Row 4 was preempted and is admitted again, with its sampled token among its known tokens.
    back = admitted(4, [8, 9, 8, 9, 55], [2, 3])
    got = step(state, plan([(1, 3, 1), (4, 4, 1)], decodes=2, samples=[0, 1], admitted=[back]))
    assert got.batch.token_ids.tolist() == [70, 55]
    assert got.last_index.tolist() == [0, 1]
    assert got.batch.read is None
    state.set_latest(got.sampled_rows, torch.tensor([80, 81]))
    grown = [GrownRow(1, 1, [9])]
    got = step(state, plan([(4, 5, 1), (1, 4, 1)], decodes=2, samples=[0, 1], grown=grown))
    assert got.batch.token_ids.tolist() == [81, 80]
    assert got.batch.slots.tolist() == [3 * 4 + 1, 9 * 4]
    assert got.batch.block_tables.tolist() == [[2, 3], [0, 9]]


def test_more_blocks_than_the_longest_context_has_are_an_internal_error():
    with pytest.raises(InternalError, match="row 1 is given 17 blocks"):
        step(rows(), plan([(1, 0, 1)], admitted=[admitted(1, [1], list(range(17)))]))
