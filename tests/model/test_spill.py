"""Tests that a context larger than the KV cache gives the tokens of a run in a large cache: older blocks lie in the host tier.

The context has 6,000 tokens in a cache of 1,600. TIDEGATE_TEST_CONTEXT=60000 in the environment makes that 60,000 and 16,000.
"""

import os
import random

import pytest
import tiny
import torch

from engine import SamplingParams
from engine.attention import spilled
from engine.batch import HOST, ForwardBatch
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.core import build_core
from engine.device.build import build
from engine.errors import ConfigError
from engine.kvcache.storage import KVStorage
from engine.messages import Submit, pack_tokens
from engine.models import registry
from engine.models.families import read_spec
from engine.weights import loader

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


def test_ordinary_requests_run_beside_a_context_larger_than_the_cache(folder):
    """All tokens of the requests, in turn with the steps of the large context, are those of the requests alone."""
    prompts = {"long": prompt_of(CONTEXT // 2), "a": prompt_of(40, 1), "b": prompt_of(300, 2)}
    small = config(folder, L1_BLOCKS, chunk=256, host=HOST_BYTES, resident=64)
    together, read = run(small, [submit(name, prompt) for name, prompt in prompts.items()])
    ordinary_between = [at for at, num in enumerate(read) if num == 0 and any(read[:at]) and any(read[at:])]
    assert len(ordinary_between) > 5
    large = config(folder, CONTEXT // BLOCK + 4, chunk=256)
    for name, prompt in prompts.items():
        alone, _ = run(large, [submit(name, prompt)])
        assert tokens_of(together[name]) == tokens_of(alone[name])


def test_prompt_logprobs_of_a_spilled_context_are_those_of_a_large_cache(folder):
    prompt = prompt_of(CONTEXT // 3)
    one = [submit("long", prompt, 2, prompt_logprobs=1)]
    small, read = run(config(folder, L1_BLOCKS // 2, chunk=300, host=HOST_BYTES), one)
    large, _ = run(config(folder, CONTEXT // BLOCK + 4, chunk=300), one)
    assert max(read) > 0
    found, wanted = (torch.tensor([p.logprob for p in e["long"][0].prompt_logprobs[1:]]) for e in (small, large))
    assert found.shape == (len(prompt) - 1,)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


SIZE, LENGTH = 4, 50


@torch.inference_mode()
@pytest.mark.parametrize("segment", [8, 2048])
@pytest.mark.parametrize(("start", "num"), [(49, 1), (48, 2), (30, 20), (16, 34), (7, 43)])
def test_logits_do_not_depend_on_where_the_context_is_split(folder, start, num, segment, monkeypatch):
    monkeypatch.setattr(spilled, "SEGMENT_TOKENS", segment)
    monkeypatch.setattr(spilled, "QUERY_TOKENS", 9)
    model = registry.build(read_spec(folder), dtype=torch.float32, device=torch.device("cpu"))
    loader.load(model, folder)
    tokens = prompt_of(LENGTH)
    storage = KVStorage(model.kv_pools(), num_blocks=20, block_size=SIZE, device=torch.device("cpu"))
    table = torch.randperm(20, generator=torch.Generator().manual_seed(1))[: -(-LENGTH // SIZE)]
    whole = model.logits(model(batch_of(tokens, 0, LENGTH, table, storage.layers)))
    records = torch.empty(30, storage.record_words, dtype=storage.word)
    slots = torch.arange(28, 28 - len(table), -1)
    storage.pack(table, packed := torch.empty(len(table), storage.record_words, dtype=storage.word))
    records[slots] = packed
    kv = [
        pools | {HOST + n: p for n, p in views.items()}
        for pools, views in zip(storage.layers, storage.views(records), strict=True)
    ]
    for in_host in range(start // SIZE + 1):
        for pools in storage.layers:
            for pool in pools.values():
                pool[table[:in_host]] = float("nan")  # these blocks are not read any more
        batch = batch_of(tokens, start, num, table, kv, slots[:in_host])
        torch.testing.assert_close(model.logits(model(batch)), whole[start : start + num], rtol=1e-4, atol=1e-4)


def batch_of(tokens, start, num, table, kv, slots=None):
    """Return the batch of one slice. The first blocks lie in `slots`, the others in the blocks of `table`."""
    positions = torch.arange(start, start + num)
    return ForwardBatch(
        token_ids=torch.tensor(tokens[start : start + num]),
        positions=positions,
        slots=table[positions // SIZE] * SIZE + positions % SIZE,
        query_starts=torch.tensor([0, num], dtype=torch.int32),
        kv_lens=torch.tensor([start + num], dtype=torch.int32),
        block_tables=table[0 if slots is None else len(slots) :][None].int(),
        num_decodes=int(num == 1),
        query_lens_host=[num],
        kv_lens_host=[start + num],
        kv=kv,
        spilled=slots,
    )


def test_a_max_model_len_that_cache_and_host_tier_cannot_hold_is_refused_by_the_names_of_the_settings(folder):
    with pytest.raises(ConfigError, match=r"host tier \d+ more \(cache.host_tier_bytes is 100000\).* at least (\d+)$") as refused:
        build(config(folder, L1_BLOCKS, chunk=256, host=100_000))
    right = int(str(refused.value).split()[-1])
    assert build(config(folder, L1_BLOCKS, chunk=256, host=right)).config.max_model_len == CONTEXT + NUM_TOKENS
    with pytest.raises(ConfigError, match="max_model_len"):
        build(config(folder, L1_BLOCKS, chunk=256, host=right - 1))
