"""The steps that are run to size the KV cache: they are allowed, and as large as any step that the scheduler may plan."""

import pytest

from engine.attention.latent_chunks import EXPANDED_NUMBERS
from engine.attention.long_prompts import LENGTH_STEP, MIN_PROMPT
from engine.device.graph_shapes import GraphSizes
from engine.device.trial_steps import CONTEXT_TOKENS, NUM_TOP, TrialLimits, graph_keys

LIMITS = [
    {"max_rows": 256, "max_tokens": 8192, "max_len": 131072},
    {"max_rows": 256, "max_tokens": 8192, "max_len": 4096},
    {"max_rows": 256, "max_tokens": 16384, "max_len": 163840},
    {"max_rows": 4, "max_tokens": 4, "max_len": 50},
    {"max_rows": 1, "max_tokens": 1, "max_len": 1},
    {"max_rows": 1, "max_tokens": 1, "max_len": 300},
    {"max_rows": 3, "max_tokens": 2000, "max_len": 1500},
    {"max_rows": 64, "max_tokens": 1024, "max_len": 1024},
]


def sizes(limits):
    return TrialLimits(**limits, block_size=16)


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_every_trial_step_is_one_that_the_scheduler_may_plan(limits):
    plans = [*sizes(limits).steps(), *filter(None, [sizes(limits).long_contexts()])]
    for plan in plans:
        assert 1 <= len(plan.rows) == len(set(plan.rows)) <= limits["max_rows"]
        assert plan.rows == [a.row for a in plan.admitted]
        assert 1 <= plan.num_tokens <= limits["max_tokens"]
        assert plan.samples == list(range(len(plan.rows)))
        for a, start, num in zip(plan.admitted, plan.starts, plan.nums, strict=True):
            assert 0 <= start < start + num == len(a.tokens) == a.num_prompt <= limits["max_len"]
            assert set(a.blocks) == {0}
            assert (len(a.blocks) - 1) * 16 < len(a.tokens) <= len(a.blocks) * 16


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_the_steps_have_all_rows_all_options_and_as_many_tokens_as_are_allowed(limits):
    all_rows, one_prompt, padded, *chunks = sizes(limits).steps()
    params = all_rows.admitted[0].params
    assert len(all_rows.rows) == limits["max_rows"]
    assert params.has_penalties
    assert params.logit_bias
    assert params.logprobs == NUM_TOP
    assert params.min_tokens > 0
    longest = min(limits["max_tokens"], limits["max_len"])
    assert one_prompt.num_tokens in (longest - 1, longest)
    assert one_prompt.admitted[0].params.prompt_logprobs == padded.admitted[0].params.prompt_logprobs == NUM_TOP
    if limits["max_len"] <= limits["max_tokens"]:
        assert not chunks
    else:
        (chunk,) = chunks
        assert (chunk.nums, len(chunk.rows)) == ([limits["max_tokens"]], 1)
        assert chunk.starts[0] >= min(limits["max_len"] - limits["max_tokens"], 32768 + 8192 + 2048)


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_attention_pads_no_step_of_whole_prompts_to_more_tokens_than_a_trial_step(limits):
    def padded_tokens(length, num):
        return -(-length // LENGTH_STEP) * LENGTH_STEP * num if length >= MIN_PROMPT else 0

    trial = max(padded_tokens(plan.nums[0], len(plan.nums)) for plan in sizes(limits).steps())
    for length in range(MIN_PROMPT, min(limits["max_tokens"], limits["max_len"]) + 1):
        num = min(limits["max_rows"], limits["max_tokens"] // length)
        assert padded_tokens(length, num) <= trial


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_long_contexts_reach_what_is_expanded_at_a_time(limits):
    plan, longest = sizes(limits).long_contexts(), limits["max_len"]
    if longest <= limits["max_tokens"]:
        assert plan is None
        return
    assert {len(a.tokens) for a in plan.admitted} == {longest}
    assert all(start > 0 for start in plan.starts)  # chunks behind a prefix
    total = sum(len(a.tokens) for a in plan.admitted)
    possible = longest * min(limits["max_rows"], max(1, limits["max_tokens"] // 2))
    assert total >= min(possible, max(longest, CONTEXT_TOKENS // 2))
    assert CONTEXT_TOKENS * 1024 == EXPANDED_NUMBERS


@pytest.mark.parametrize(("max_rows", "max_tokens"), [(256, 2048), (256, 0), (1, 2048), (1, 0), (1000, 64)])
def test_the_captured_graphs_begin_with_the_largest_ones(max_rows, max_tokens):
    keys = GraphSizes.of(max_rows, max_tokens).all_keys()
    largest = max(keys)
    found = graph_keys([largest, *(key for key in keys if key != largest)])
    assert len(found) == len(set(found)) <= 6
    assert set(found) <= set(keys)
    assert found[0] == largest
    assert (max_rows, 0) in found[:2]
