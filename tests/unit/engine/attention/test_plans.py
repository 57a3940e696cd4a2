"""Tests that a server's steps use cuDNN only for lengths that it has planned, and that the rest goes to our kernels."""

import pytest
import torch

from engine.attention import cached_context, long_prompts
from engine.attention.plans import Plan, Plans
from engine.attention.triton_gqa import TritonGqa
from engine.batch import ForwardBatch
from engine.kernels.hardware import GPUS, planned_for

META, BF16 = torch.device("meta"), torch.bfloat16


@pytest.fixture(autouse=True)
def _a_gpu():
    with planned_for(GPUS["h200"]):
        yield


def batch(*queries: tuple[int, int]) -> ForwardBatch:
    """Make a batch of chunks, each (tokens in the KV cache after the step, tokens of this step)."""
    total = sum(num for _, num in queries)
    pool = torch.empty(4, 64, 8, 128, dtype=BF16, device=META)
    numbers = torch.empty(total, dtype=torch.int64, device=META)
    return ForwardBatch(
        token_ids=numbers,
        positions=numbers,
        slots=numbers,
        query_starts=torch.empty(len(queries) + 1, dtype=torch.int32, device=META),
        kv_lens=torch.empty(len(queries), dtype=torch.int32, device=META),
        block_tables=torch.empty(len(queries), 4, dtype=torch.int32, device=META),
        num_decodes=0,
        query_lens_host=[num for _, num in queries],
        kv_lens_host=[length for length, _ in queries],
        kv=[{"k": pool, "v": pool}],
    )


def test_without_leave_to_plan_only_planned_lengths_are_taken():
    plans, known, other = Plans(), Plan(512, 512, True), Plan(1024, 1024, True)
    assert plans.take({known})
    plans.on_demand = False
    assert plans.take({known})
    assert not plans.take({known, other})
    assert not plans.take({other})
    plans.on_demand = True
    assert plans.take({known, other})


def test_prompts_of_lengths_without_a_plan_go_elsewhere():
    plans = Plans()
    planned, other, step = (1500, 1500), (3000, 3000), batch((1500, 1500), (3000, 3000))
    assert long_prompts.find_prompts(batch(planned), BF16, plans).tokens == [range(1500)]
    plans.on_demand = False
    assert long_prompts.find_prompts(step, BF16, plans).tokens == [range(1500)]
    assert long_prompts.find_prompts(batch(other), BF16, plans).tokens == []


def test_prompts_that_fill_a_step_are_taken_one_by_one_if_that_is_what_is_planned():
    plans = Plans()
    one, both = batch((1500, 1500), (9, 9)), batch((1500, 1500), (1500, 1500))
    assert not long_prompts.find_prompts(one, BF16, plans).together  # the plan of a prompt among others: padded, alone
    plans.on_demand = False
    assert long_prompts.find_prompts(both, BF16, plans) == ([range(1500), range(1500, 3000)], False)
    plans.on_demand = True
    assert long_prompts.find_prompts(both, BF16, plans).together


def test_a_chunk_that_is_divided_goes_elsewhere_as_a_whole():
    plans = Plans()
    first = batch((8192 + 32768, 8192))
    assert len(cached_context.find(first, BF16, 128, 128, plans)) == 1
    plans.on_demand = False
    assert len(cached_context.find(first, BF16, 128, 128, plans)) == 1
    divided = batch((8192 + 6144 + 32768, 8192 + 6144))  # its first piece has 7,168 tokens, which is not planned
    assert cached_context.find(divided, BF16, 128, 128, plans) == []
    plans.on_demand = True
    assert len(cached_context.find(divided, BF16, 128, 128, plans)) == 2


def test_the_warm_up_plans_every_length_of_a_servers_chunks():
    """After its warm-up chunks, attention takes a whole prompt, and a chunk behind a context, of every length to cuDNN. Whole
    prompts that need no padding are rare, and have plans of their own."""
    attention = TritonGqa(132)
    for chunk in attention.warmup_chunks(8192, 131072, BF16):
        cached_context.find_long(batch((chunk.cached + chunk.num, chunk.num)), BF16, 128, 128, attention.plans)
    attention.allow_plans(False)
    for num in range(1025, 8193, 173):
        assert long_prompts.find_prompts(batch((num, num), (5, 5)), BF16, attention.plans).tokens, num
        for cached in range(16384, 120000, 9973):
            assert cached_context.find(batch((cached + num, num)), BF16, 128, 128, attention.plans), (num, cached)
