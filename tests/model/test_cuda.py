"""Tests on a GPU. Triton attention, CUDA graphs, and overlapped steps (submitted before the last tokens are read) give the CPU's
tokens in float32, and bfloat16 graphs give the tokens of steps without a graph.
"""

from __future__ import annotations

import random

import pytest
import tiny
import torch

from engine import LLM, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIGS = {
    "llama": tiny.LLAMA | {"hidden_size": 64, "head_dim": 16},
    "deepseek_v3": tiny.DEEPSEEK_V3
    | {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "hidden_size": 64},
}


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def folder(request, tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp(request.param), CONFIGS[request.param], std=0.2)


def run(folder, **options):
    rng = random.Random(0)
    prompts = [[rng.randrange(2, tiny.VOCAB) for _ in range(rng.randint(3, 150))] for _ in range(24)]
    params = [
        SamplingParams(
            max_tokens=40,
            temperature=0.0 if i % 2 else 0.9,
            seed=i,
            top_p=0.9 if i % 3 else 1.0,
            repetition_penalty=1.1 if i % 7 == 0 else 1.0,
            bad_words=((2 + i,), (5, 6), (7, 7, 7)) if i % 4 == 0 else (),
            allowed_token_ids=tuple(range(2, 40)) if i % 5 == 0 else None,
            ignore_eos=True,
        )
        for i in range(24)
    ]
    options = {
        "dtype": "float32",
        "debug_checks": True,
        **options,
        "cache": {"block_size": 16, "num_blocks": 400, **options.get("cache", {})},
    }
    with LLM(folder, **options) as llm:
        return [c.token_ids for c in llm.generate(prompts, params)]


@pytest.mark.parametrize(
    "options",
    [
        {"overlap": True},
        {"overlap": True, "cache": {"num_blocks": 100, "host_tier_bytes": 64 << 20}, "scheduler": {"max_num_seqs": 4}},
        {"overlap": False},
        {"cuda_graphs": False},
        {"overlap": True, "cache": {"num_blocks": 60}, "scheduler": {"max_step_tokens": 300}},
    ],
    ids=["overlapped", "host-tier", "plain", "eager", "preempting"],
)
def test_tokens_are_those_of_the_cpu(folder, options):
    assert run(folder, device="cuda", **options) == run(folder, device="cpu")


def test_bfloat16_graphs_give_what_eager_steps_give(folder):
    """A CUDA graph runs more rows than the step has. The rounding of a matrix product depends on the number of rows, so the
    logits may differ slightly."""
    graphs = run(folder, device="cuda", dtype="bfloat16", scheduler={"max_num_seqs": 24})
    eager = run(folder, device="cuda", dtype="bfloat16", scheduler={"max_num_seqs": 24}, cuda_graphs=False)
    first = [(a[0], b[0]) for a, b in zip(graphs, eager, strict=True)]
    assert all(a == b for a, b in first)
    same = sum(x == y for a, b in zip(graphs, eager, strict=True) for x, y in zip(a, b, strict=True))
    assert same >= 0.8 * sum(map(len, graphs))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_a_decode_step_never_waits_for_the_device(folder):
    with LLM(folder, device="cuda", dtype="bfloat16", cache={"block_size": 16, "num_blocks": 200}) as llm:
        stream = llm.stream([5, 6, 7], SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True))
        for _ in range(20):  # run until all graphs have been captured
            next(stream)
        runner = llm._core._runner
        submit = runner.submit

        def strictly(plan):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return submit(plan)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        runner.submit = strictly
        assert sum(len(event.tokens) for event in stream) == 40
