"""Tests that steps in CUDA graphs give the results of plain steps. `graph_stand_in.py` replaces the graphs, so no GPU is
needed."""

from __future__ import annotations

import random

import graph_stand_in
import pytest
import tiny
import torch

from engine import LLM, SamplingParams

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels take CPU tensors in the interpreter only")

CONFIGS = {
    "llama": tiny.LLAMA | {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 1},
    "deepseek_v3": tiny.DEEPSEEK_V3
    | {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_hidden_layers": 1},
}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Keep the runner from raising the number of torch's threads, which conftest.py of this folder sets to one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def with_graphs(monkeypatch):
    return graph_stand_in.install(monkeypatch)


def run(folder, **options):
    rng = random.Random(0)
    lens = [1, 13, 40, 14, 1, 62, 1, 31]
    prompts = [[rng.randrange(2, tiny.VOCAB) for _ in range(n)] for n in lens]
    params = [
        SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True),
        SamplingParams(max_tokens=6, temperature=0.8, seed=3, ignore_eos=True),
        SamplingParams(max_tokens=6, temperature=0.0, logprobs=2, ignore_eos=True),
        SamplingParams(max_tokens=6, temperature=0.9, seed=5, repetition_penalty=1.3, presence_penalty=0.4, ignore_eos=True),
        SamplingParams(max_tokens=6, temperature=0.0, min_tokens=4),
        SamplingParams(max_tokens=5, temperature=0.0, prompt_logprobs=1, ignore_eos=True),
        SamplingParams(max_tokens=6, temperature=0.0, logit_bias={5: 3.0}, ignore_eos=True),
        SamplingParams(max_tokens=6, temperature=0.9, seed=9, top_p=0.8, top_k=20, ignore_eos=True),
    ]
    options = {
        "dtype": "float32",
        "device": "cpu",
        "debug_checks": True,
        "scheduler": {"max_num_seqs": 4, "max_step_tokens": 48},
    } | options
    with LLM(folder, cache={"block_size": 16, "num_blocks": 7}, **options) as llm:
        done = llm.generate(prompts, params)
        assert llm.stats().num_preemptions
    return done


@pytest.mark.parametrize(("name", "overlap"), [("llama", True), ("deepseek_v3", False)])
def test_steps_in_graphs_give_the_results_of_plain_steps(name, overlap, tmp_path, request):
    folder = tiny.write(tmp_path, CONFIGS[name], std=0.2)
    plain = run(folder)
    kinds = request.getfixturevalue("with_graphs").kinds
    found = run(folder, overlap=overlap)
    assert kinds == {True, False}
    assert_equal(found, plain)


@pytest.mark.parametrize(("captured", "used"), [(0, set()), (2, {True, False})])
def test_a_server_whose_graphs_do_not_exist_yet_runs_the_steps_in_others_or_without(captured, used, tmp_path, request):
    """With two graphs, the smallest and the largest, steps of decodes fit the first or run without a graph."""
    folder = tiny.write(tmp_path, CONFIGS["llama"], std=0.2)
    plain = run(folder)
    graphs = request.getfixturevalue("with_graphs")
    request.getfixturevalue("monkeypatch").setattr(graphs, "at_start", captured)
    assert_equal(run(folder, offline=False, startup_budget_s=0), plain)
    assert graphs.kinds == used


def assert_equal(found, plain):
    for a, b in zip(found, plain, strict=True):
        assert a.token_ids == b.token_ids
        assert a.prompt_logprobs is None or len(a.prompt_logprobs) == len(a.prompt_token_ids)
        for mine, theirs in ((a.logprobs, b.logprobs), (a.prompt_logprobs, b.prompt_logprobs)):
            assert (mine is None) == (theirs is None)
            for p, q in zip(mine or [], theirs or [], strict=True):
                assert (p is None) == (q is None)
                assert p is None or (p.token == q.token and p.logprob == pytest.approx(q.logprob, abs=1e-3))
