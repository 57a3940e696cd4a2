"""A request gets the same tokens however it is run: alone, in a batch, in chunks, preempted, from the cache, forked, overlapped.

The reference is the function `plain`. For each token it runs the model over the whole sequence, and samples with the plain twin
of the sampler.
"""

from __future__ import annotations

import itertools
import random
from contextlib import suppress

import numpy as np
import pytest
import tiny
import torch

from engine import LLM, SamplingParams
from engine.batch import ForwardBatch
from engine.config import CacheConfig, EngineConfig
from engine.core import build_core
from engine.kvcache.storage import KVStorage
from engine.messages import Submit, pack_tokens
from engine.models import registry
from engine.models.families import read_spec
from engine.sampling import reference
from engine.weights import loader

BLOCK = 4


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Keep the runner from raising the number of torch's threads, which conftest.py of this folder sets to one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module", params=sorted(tiny.CONFIGS))
def folder(request, tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp(request.param), tiny.CONFIGS[request.param])


@pytest.fixture(scope="module")
def model(folder):
    model = registry.build(read_spec(folder), dtype=torch.float32, device=torch.device("cpu"))
    loader.load(model, folder)
    return model


@torch.inference_mode()
def all_logits(model, tokens):
    """Return the logits [len(tokens), V] of one forward pass over `tokens`, with nothing in the KV cache before."""
    n = len(tokens)
    storage = KVStorage(model.kv_pools(), num_blocks=1, block_size=n, device=torch.device("cpu"))
    batch = ForwardBatch(
        token_ids=torch.tensor(tokens),
        positions=torch.arange(n),
        slots=torch.arange(n),
        query_starts=torch.tensor([0, n], dtype=torch.int32),
        kv_lens=torch.tensor([n], dtype=torch.int32),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        num_decodes=0,
        query_lens_host=[n],
        kv_lens_host=[n],
        kv=storage.layers,
    )
    return model.logits(model(batch)).numpy()


class TooClose(Exception):
    """Raised for a near tie. Float32 rounding depends on the shape of the batch and could decide it."""


def margin(logits, tokens, num_prompt, params, seed, eos):
    """Return how far the choice of the next token is from another choice: in logits if greedy, otherwise in probability."""
    adjusted = reference.adjust(logits.astype(np.float64), tokens, num_prompt, params, eos)
    if params.greedy:
        best = np.sort(adjusted)[-2:]
        return best[1] - best[0]
    edges = reference.probabilities(adjusted, params).cumsum()
    return np.abs(edges - reference.uniform(seed, len(tokens))).min()


def plain(model, prompt, params, seed=0):
    """Generate without cache, batch or scheduler. Returns (tokens, log-probabilities). Raises TooClose for a near tie."""
    tokens, logprobs = list(prompt), []
    while len(tokens) < len(prompt) + params.max_tokens:
        logits, eos = all_logits(model, tokens)[-1], model.spec.eos_token_ids
        if margin(logits, tokens, len(prompt), params, seed, eos) < 3e-5:
            raise TooClose
        token, record = reference.sample(logits, tokens, len(prompt), params, seed, eos)
        tokens.append(token)
        logprobs.append(record)
        outputs = len(tokens) - len(prompt)
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else model.spec.eos_token_ids)}
        if token in stops and outputs >= params.min_tokens:
            break
    return tokens[len(prompt) :], logprobs


def cases(model, params, *, seed=0, low=1, high=40):
    """Return (prompt, tokens, log-probabilities) by `plain` for each of `params`, with random prompts that have no near tie."""
    r = random.Random(seed)
    found = []
    for p in params:
        while True:
            prompt = [r.randrange(tiny.VOCAB) for _ in range(r.randint(low, high))]
            with suppress(TooClose):
                found.append((prompt, *plain(model, prompt, p, p.seed or 0)))
                break
    return found


def prompts(n, seed=0, low=1, high=40):
    r = random.Random(seed)
    return [[r.randrange(tiny.VOCAB) for _ in range(r.randint(low, high))] for _ in range(n)]


def llm(folder, *, step=64, rows=32, blocks=600, overlap=False, prefix=False):
    return LLM(
        folder,
        device="cpu",
        overlap=overlap,
        debug_checks=True,
        cache={"block_size": BLOCK, "num_blocks": blocks, "prefix_caching": prefix},
        scheduler={"max_num_seqs": rows, "max_step_tokens": step},
    )


def config(folder, *, overlap=False):
    return EngineConfig(
        model=str(folder), device="cpu", overlap=overlap, debug_checks=True, cache=CacheConfig(block_size=BLOCK, num_blocks=99)
    )


GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def greedy(model):
    """Return 32 prompts, and the tokens that each must generate."""
    found = cases(model, [GREEDY] * 32)
    return [prompt for prompt, _, _ in found], [tokens for _, tokens, _ in found]


@pytest.mark.parametrize("overlap", [False, True], ids=["plain loop", "overlapped"])
@pytest.mark.parametrize(
    "options",
    [
        {"rows": 1, "step": 64},
        {"rows": 32, "step": 512},
        {"rows": 4, "step": 5},
        {"rows": 32, "step": 32, "blocks": 40},
        {"rows": 32, "step": 64, "prefix": True, "blocks": 900},
    ],
    ids=["one at a time", "all at once", "in small chunks", "with preemption", "with prefix cache"],
)
def test_greedy_tokens_do_not_depend_on_how_they_were_scheduled(folder, greedy, options, overlap):
    many, expected = greedy
    with llm(folder, overlap=overlap, **options) as engine:
        for again in (False, True):
            got = engine.generate(many, GREEDY)
            assert [c.token_ids for c in got] == expected
            if options.get("prefix") and again:
                assert sum(c.num_cached for c in got) > 200
        if "blocks" in options and options["blocks"] < 100:
            assert engine.stats().num_preemptions > 10


@pytest.mark.parametrize("overlap", [False, True], ids=["plain loop", "overlapped"])
def test_seeded_samples_do_not_depend_on_the_batch(folder, model, overlap):
    """Requests of every kind run at once. Each generates the tokens that it generates alone, and that `plain` generates."""
    r = random.Random(5)
    params = [
        SamplingParams(
            max_tokens=r.randint(1, 20),
            temperature=r.choice([0.0, 0.7, 1.3]),
            top_k=r.choice([0, 0, 7]),
            top_p=r.choice([1.0, 0.8]),
            min_p=r.choice([0.0, 0.05]),
            presence_penalty=r.choice([0.0, 0.9]),
            frequency_penalty=r.choice([0.0, 0.4]),
            repetition_penalty=r.choice([1.0, 1.2]),
            logit_bias=r.choice([None, {11: 3.0, 12: -100.0}]),
            min_tokens=r.choice([0, 1]),
            stop_token_ids=r.choice([(), (3, 4, 5, 6, 7, 8, 9)]),
            seed=100 + i,
        )
        for i in range(32)
    ]
    found = cases(model, params, seed=3)
    many, expected = [prompt for prompt, _, _ in found], [tokens for _, tokens, _ in found]
    with llm(folder, overlap=overlap, step=40, blocks=30) as engine:
        assert [c.token_ids for c in engine.generate(many, params)] == expected
        assert engine.stats().num_preemptions > 0
        assert [engine.generate([p], q)[0].token_ids for p, q in zip(many[:8], params, strict=False)] == expected[:8]


def test_a_resubmitted_request_continues_after_its_last_token(folder, model):
    """After a crash, the prompt and the tokens received so far are submitted again."""
    params = SamplingParams(max_tokens=20, frequency_penalty=0.5, ignore_eos=True, seed=77)
    prompt, expected, _ = cases(model, [params], seed=9)[0]
    for received in (1, 7, 19):
        core = build_core(config(folder))
        core.submit(
            Submit(request_id="a", prompt=pack_tokens(prompt), params=params, seed=77, outputs=pack_tokens(expected[:received]))
        )
        tokens = list(expected[:received])
        while core.has_work:
            tokens += [t for event in core.step() for t in event.tokens]
        assert tokens == expected


@pytest.mark.parametrize("overlap", [False, True], ids=["plain loop", "overlapped"])
@pytest.mark.parametrize("length", [BLOCK * 3, BLOCK * 3 + 1, BLOCK * 3 + 3, 1])
def test_forks_share_a_prompt_and_nothing_else(folder, model, length, overlap):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompt, expected = shared_case(model, params, length)
    core = build_core(config(folder, overlap=overlap))
    for i in range(4):
        core.submit(
            Submit(request_id=f"f{i}", prompt=pack_tokens(prompt), params=params, seed=i, fork_of=None if i == 0 else "f0")
        )
    tokens = {f"f{i}": [] for i in range(4)}
    while core.has_work:
        for event in core.step():
            tokens[event.request_id] += event.tokens
    assert tokens == {f"f{i}": expected[i] for i in range(4)}


def shared_case(model, params, length):
    """Return a prompt of `length` tokens, and the tokens that `plain` generates for it with the seeds 0 to 3."""
    for prompt in prompts(100, seed=length, low=length, high=length):
        with suppress(TooClose):
            return prompt, [plain(model, prompt, params, i)[0] for i in range(4)]
    pytest.fail("no prompt without near ties")


def test_logprobs_are_those_of_the_model(folder, model):
    params = [
        SamplingParams(max_tokens=5, temperature=t, seed=1, logprobs=k) for t, k in zip([0, 1] * 3, [0, 1, 20] * 2, strict=True)
    ]
    found = cases(model, params, seed=21, low=2)
    with llm(folder) as engine:
        got = engine.generate([prompt for prompt, _, _ in found], params)
    for completion, (_, tokens, expected) in zip(got, found, strict=True):
        assert completion.token_ids == tokens
        for a, b in zip(completion.logprobs, expected, strict=True):
            assert_same_logprobs(a, b)


def assert_same_logprobs(a, b):
    """Assert that two log-probability records are equal up to rounding. Alternatives that are near ties may change places."""
    assert (a.token, len(a.top_ids)) == (b.token, len(b.top_ids))
    assert [a.logprob, *a.top_logprobs] == pytest.approx([b.logprob, *b.top_logprobs], abs=1e-4)
    clear = all(x - y > 1e-3 for x, y in itertools.pairwise(sorted([b.logprob, *b.top_logprobs], reverse=True)) if x != y)
    if clear:
        assert (a.rank, a.top_ids[:-1]) == (b.rank, b.top_ids[:-1])


@pytest.mark.parametrize(("step", "chunk"), [(512, 1 << 25), (7, 1 << 25), (512, 1)])
def test_prompt_logprobs_are_those_of_the_model(folder, model, monkeypatch, step, chunk):
    monkeypatch.setattr("engine.sampling.prompt_logprobs._CHUNK_ELEMENTS", chunk)
    many = [*prompts(5, seed=22, low=2), [5]]
    params = [SamplingParams(max_tokens=3, temperature=0.0, prompt_logprobs=k) for k in (0, 1, 5, None, 20, 2)]
    with llm(folder, step=step, rows=6, prefix=True) as engine:
        engine.generate(many, GREEDY)  # positions found in the prefix cache must be reported too
        for prompt, p, got in zip(many, params, engine.generate(many, params), strict=True):
            if p.prompt_logprobs is None:
                assert got.prompt_logprobs is None
                continue
            assert got.prompt_logprobs[0] is None
            logits = all_logits(model, prompt)
            expected = [reference.logprobs(logits[i], t, p.prompt_logprobs) for i, t in enumerate(prompt[1:])]
            assert len(got.prompt_logprobs) == len(prompt)
            for a, b in zip(got.prompt_logprobs[1:], expected, strict=True):
                assert_same_logprobs(a, b)


def test_no_stop_token_is_sampled_before_min_tokens(folder, model):
    """A stop token with a large bias is sampled at once without min_tokens, and right after min_tokens tokens with it."""
    for least in (0, 1, 5):
        params = SamplingParams(max_tokens=9, temperature=0.0, min_tokens=least, stop_token_ids=(50,), logit_bias={50: 100.0})
        prompt, expected, _ = cases(model, [params], seed=30)[0]
        with llm(folder) as engine:
            got = engine.generate([prompt], params)[0]
        assert got.token_ids == expected
        assert len(got.token_ids) == least + 1
        assert got.token_ids.index(50) == least


def test_a_bias_of_minus_100_bans_a_token(folder):
    prompt = prompts(1, seed=31)[0]
    banned = {t: -100.0 for t in range(tiny.VOCAB) if t % 2}
    with llm(folder) as engine:
        got = engine.generate([prompt], SamplingParams(max_tokens=32, logit_bias=banned, ignore_eos=True, seed=4))[0]
    assert not any(t % 2 for t in got.token_ids)
    assert len(got.token_ids) == 32
