"""Tests that a row whose logits are NaN gets NO_TOKEN, and does not change the tokens of other rows or of later owners of its
blocks.

One token of the model's vocabulary has an embedding of NaN, so a prompt that holds it fails and no other prompt does.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import graph_stand_in
import pytest
import tiny
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.core import build_core
from engine.device.build import build
from engine.messages import Submit, pack_tokens
from engine.plan import NO_TOKEN, AdmittedRow, StepPlan
from engine.request import FinishReason, SamplingParams

BAD = 7  # the token whose embedding is NaN
BLOCK = 16
CONFIGS = {
    "llama": tiny.LLAMA | {"hidden_size": 64, "head_dim": 16},
    "deepseek_v3": tiny.DEEPSEEK_V3 | {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16},
}
OPTIONS = {
    "greedy": {"temperature": 0.0},
    "random": {"temperature": 0.9, "top_p": 0.9},
    "adjusted": {"temperature": 0.0, "repetition_penalty": 1.2, "logit_bias": {5: 2.0}, "min_tokens": 3, "logprobs": 2},
}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Keep the runner from changing the number of torch's threads, which this folder's conftest sets."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


class Request(NamedTuple):
    row: int
    tokens: list[int]
    blocks: list[int]  # KV blocks, enough for the prompt and the generated tokens
    params: SamplingParams


def write(folder, config):
    """Write a tiny checkpoint in which the embedding of token BAD is NaN. Returns its folder."""
    folder = tiny.write(folder, config, std=0.2)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][BAD] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def built(folder, device="cpu", dtype="float32", cuda_graphs=None):
    config = EngineConfig(
        model=str(folder),
        device=device,
        dtype=dtype,
        cuda_graphs=cuda_graphs,
        cache=CacheConfig(block_size=BLOCK, num_blocks=24),
        scheduler=SchedulerConfig(max_num_seqs=6, max_step_tokens=128),
    )
    return build(config).runner


def generate(runner, requests: list[Request], num: int = 3) -> dict[int, list[int]]:
    """Run one step with all prompts, then `num - 1` steps of decodes. Returns the tokens of each request by row."""
    rows, lens = [r.row for r in requests], [len(r.tokens) for r in requests]
    admitted = [AdmittedRow(r.row, r.tokens, len(r.tokens), r.blocks, r.params, r.row) for r in requests]
    everyone = list(range(len(rows)))
    plans = [StepPlan(1, rows=rows, starts=[0] * len(rows), nums=lens, samples=everyone, admitted=admitted)]
    for i in range(num - 1):
        plans.append(StepPlan(2 + i, rows, [n + i for n in lens], [1] * len(rows), len(rows), everyone))
    tokens: dict[int, list[int]] = {row: [] for row in rows}
    for plan in plans:
        result = runner.submit(plan).result()
        for row, token in zip(rows, result.tokens, strict=True):
            tokens[row].append(token)
        failed = {i for i, token in enumerate(result.tokens) if token == NO_TOKEN}
        wanted = {i for i, r in enumerate(requests) if r.params.logprobs is not None}
        assert result.logprobs.keys() == wanted - failed
        assert all(math.isfinite(record.logprob) for record in result.logprobs.values())
    return tokens


def requests(options, *, seed: int = 0) -> list[Request]:
    """Make five requests whose KV blocks are in random order. The prompts of rows 1 and 4 hold the token BAD."""
    r = random.Random(seed)
    lens = [3, 20, 33, 5, 17]
    blocks = r.sample(range(24), 20)
    found = []
    for row, length in enumerate(lens):
        tokens = [r.choice([t for t in range(2, tiny.VOCAB) if t != BAD]) for _ in range(length)]
        if row in (1, 4):
            tokens[r.randrange(length)] = BAD
        found.append(Request(row, tokens, blocks[row * 4 : row * 4 + 4], SamplingParams(max_tokens=99, **options)))
    return found


CASES = [(name, options, False) for name in CONFIGS for options in OPTIONS]
# Only two cases run in graphs, since Triton's interpreter takes seconds for each.
CASES += [("llama", "random", True), ("deepseek_v3", "adjusted", True)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns of NaN in Triton's interpreter
@pytest.mark.parametrize(("name", "options", "in_graphs"), CASES)
def test_other_rows_are_unharmed_and_so_are_later_owners_of_the_blocks(name, options, in_graphs, tmp_path, monkeypatch):
    if in_graphs and torch.cuda.is_available():
        pytest.skip("the stand-in for graphs takes CPU tensors, which kernels accept in the interpreter only")
    folder = write(tmp_path, CONFIGS[name] | {"num_hidden_layers": 1 if in_graphs else 2})
    if in_graphs:
        graph_stand_in.install(monkeypatch)
    runner, many = built(folder), requests(OPTIONS[options])
    healthy = [r for r in many if r.row not in (1, 4)]
    expected = generate(built(folder), healthy)
    found = generate(runner, many)
    assert found == expected | {row: [NO_TOKEN] * 3 for row in (1, 4)}
    # The healthy requests run once more, in blocks that held NaN.
    moved = [r._replace(blocks=many[other].blocks) for r, other in zip(healthy, (1, 4, 2), strict=True)]
    assert generate(runner, moved) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_on_cuda_other_rows_are_unharmed_and_so_are_later_owners_of_the_blocks(name, options, cuda_graphs, tmp_path):
    """Both compared runs have steps of the same shapes, since bfloat16 tokens may depend on the shape of a step."""
    cuda = {"device": "cuda", "dtype": "bfloat16", "cuda_graphs": cuda_graphs}
    folder = write(tmp_path, CONFIGS[name] | {"num_hidden_layers": 2})
    runner, many = built(folder, **cuda), requests(OPTIONS[options])
    healed = [r._replace(tokens=[5 if t == BAD else t for t in r.tokens]) for r in many]
    expected = generate(built(folder, **cuda), healed)
    assert generate(runner, many) == expected | {row: [NO_TOKEN] * 3 for row in (1, 4)}
    healthy = [r for r in many if r.row not in (1, 4)]
    moved = [r._replace(blocks=many[other].blocks) for r, other in zip(healthy, (1, 4, 2), strict=True)]
    assert generate(runner, moved) == generate(built(folder, **cuda), healthy)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_engine_ends_the_failed_requests_and_no_others(name, overlap, tmp_path):
    core = core_of(write(tmp_path, CONFIGS[name]), overlap=overlap)
    many = requests({"temperature": 0.0, "ignore_eos": True})
    many = [r._replace(params=replace(r.params, max_tokens=6)) for r in many]
    tokens, ends = run_to_the_end(core, many)
    assert {row: end.finish for row, end in ends.items()} == {
        row: FinishReason.ERROR if row in (1, 4) else FinishReason.LENGTH for row in range(5)
    }
    assert tokens[1] == tokens[4] == []
    stats = core.stats()
    assert (stats.num_failed, stats.num_finished, stats.blocks_used, stats.running) == (2, 3, 0, 0)
    healthy = [r for r in many if r.row not in (1, 4)]
    assert run_to_the_end(core, healthy)[0] == {r.row: tokens[r.row] for r in healthy}
    core.close()


def test_a_model_whose_every_logit_is_nan_fails_every_request(tmp_path):
    folder = tiny.write(tmp_path, tiny.LLAMA)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][:] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    core = core_of(folder, overlap=True)
    tokens, ends = run_to_the_end(core, requests({"temperature": 1.0, "logprobs": 3}))
    assert all(end.finish is FinishReason.ERROR for end in ends.values())
    assert not any(tokens.values())
    assert core.stats().num_failed == 5
    core.close()


def core_of(folder, *, overlap):
    scheduler, cache = SchedulerConfig(max_num_seqs=8), CacheConfig(block_size=BLOCK, num_blocks=24)
    return build_core(
        EngineConfig(model=str(folder), device="cpu", overlap=overlap, debug_checks=True, scheduler=scheduler, cache=cache)
    )


def run_to_the_end(core, many: list[Request]):
    """Submit all requests together and run the core until they have ended. Returns ({row: tokens}, {row: last event})."""
    for r in many:
        core.submit(Submit(request_id=str(r.row), prompt=pack_tokens(r.tokens), params=r.params, seed=r.row))
    tokens, ends = {r.row: [] for r in many}, {}
    while core.has_work:
        for event in core.step():
            tokens[int(event.request_id)] += event.tokens
            if event.finish is not None:
                ends[int(event.request_id)] = event
    return tokens, ends
