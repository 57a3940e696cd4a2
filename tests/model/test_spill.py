"""Tests that a context larger than the KV cache gives the tokens of a run in a large cache: older blocks lie in the host tier.

The context has 6,000 tokens in a cache of 1,600. TIDEGATE_TEST_CONTEXT=60000 in the environment makes that 60,000 and 16,000.
"""

import os
import random

import pytest
import tiny
import torch

from engine import SamplingParams
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.core import build_core
from engine.messages import Submit, pack_tokens

CONTEXT = int(os.environ.get("TIDEGATE_TEST_CONTEXT", "6000"))
BLOCK = 16
L1_BLOCKS = CONTEXT * 16 // 60 // BLOCK
NUM_TOKENS = 24
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 131072}
CONFIGS = {
    "llama": tiny.LLAMA | SMALL | {"num_key_value_heads": 1},
    "deepseek_v3": tiny.DEEPSEEK_V3 | SMALL | {"num_key_value_heads": 2, "first_k_dense_replace": 2},
}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Keep the runner from raising the number of torch's threads, which conftest.py of this folder sets to one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def folder(request, tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp(request.param), CONFIGS[request.param])


def config(folder, num_blocks, *, chunk, host=0, overlap=None, resident=1024):
    return EngineConfig(
        model=str(folder),
        device="cpu",
        offline=True,
        debug_checks=True,
        overlap=overlap,
        max_model_len=CONTEXT + NUM_TOKENS,
        cache=CacheConfig(block_size=BLOCK, num_blocks=num_blocks, host_tier_bytes=host, resident_tokens=resident),
        scheduler=SchedulerConfig(max_num_seqs=4, max_step_tokens=chunk),
    )


def submit(name, prompt, num=NUM_TOKENS, **params):
    greedy = SamplingParams(max_tokens=num, temperature=0.0, ignore_eos=True, logprobs=2, **params)
    return Submit(request_id=name, prompt=pack_tokens(prompt), params=greedy, seed=0)


def run(config, submits):
    """Run requests to their ends. Returns the events of each, and how many slots of the host each step read."""
    core, events, read = build_core(config), {one.request_id: [] for one in submits}, []
    submitted = core._runner.submit

    def noted(plan):
        read.append(0 if plan.spilled is None else len(plan.spilled.slots))
        return submitted(plan)

    core._runner.submit = noted
    for one in submits:
        core.submit(one)
    while core.has_work:
        for event in core.step():
            events[event.request_id].append(event)
    assert core.stats().blocks_used == 0
    core.close()
    return events, read


def tokens_of(events):
    return [token for event in events for token in event.tokens]


def logprobs_of(events):
    return torch.tensor([record.top_logprobs for event in events for record in event.logprobs])


def prompt_of(length, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(3, tiny.VOCAB) for _ in range(length)]


@pytest.fixture(scope="module")
def large(folder):
    """The events of a prompt of CONTEXT tokens, in a cache that holds all of them."""
    events, read = run(config(folder, CONTEXT // BLOCK + 4, chunk=4096), [submit("long", prompt_of(CONTEXT))])
    assert not any(read)
    tops = logprobs_of(events["long"])
    assert (tops[:, 0] - tops[:, 1]).min() > 1e-3  # a near tie could be decided by rounding
    return events["long"]


HOST_BYTES = 4096 * (CONTEXT // BLOCK)  # enough for all blocks of either model


@pytest.mark.parametrize(("chunk", "resident", "overlap"), [(4096, 1024, False), (700, 16, True)])
def test_a_context_of_almost_four_times_the_cache_gives_the_tokens_of_a_large_cache(folder, large, chunk, resident, overlap):
    small = config(folder, L1_BLOCKS, chunk=chunk, host=HOST_BYTES, resident=resident, overlap=overlap)
    events, read = run(small, [submit("long", prompt_of(CONTEXT))])
    assert tokens_of(events["long"]) == tokens_of(large)
    assert torch.allclose(logprobs_of(events["long"]), logprobs_of(large), atol=1e-4)
    assert max(read) * BLOCK >= CONTEXT * 0.7
    assert (max(read) + L1_BLOCKS) * BLOCK >= CONTEXT
