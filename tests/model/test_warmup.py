"""Tests that the warm-up runs one prompt of each length that the model's backend requests, and writes only to the scratch
block."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import pytest
import tiny
import torch

from engine.attention.long_prompts import LENGTH_STEP, MIN_PROMPT
from engine.attention.torch_gqa import TorchGqa
from engine.attention.triton_gqa import TritonGqa
from engine.backends.torch import load
from engine.batch import WarmupChunk
from engine.config import CacheConfig, EngineConfig, SchedulerConfig, resolve
from engine.core import build_core
from engine.device.warmup import PromptWarmup
from engine.kvcache.storage import KVStorage
from engine.models.families import read_spec

CPU = torch.device("cpu")


class _Loaded(NamedTuple):
    warmup: PromptWarmup
    storage: KVStorage
    chunks: list[WarmupChunk]  # the warm-up chunks that have run


def load_warmup(folder, monkeypatch, *, max_tokens: int) -> _Loaded:
    config = EngineConfig(model=str(tiny.write(folder, tiny.LLAMA)), device="cpu", load_format="dummy")
    spec = read_spec(config.model)
    backend = load(spec, resolve(config, spec.limits(), has_cuda=False), CPU)
    kinds = [WarmupChunk(5), WarmupChunk(9), WarmupChunk(4, 20), WarmupChunk(30)]
    monkeypatch.setattr(
        TorchGqa,
        "warmup_chunks",
        lambda self, tokens, context, dtype: [c for c in kinds if c.num <= tokens and sum(c) <= context],
    )
    chunks, rehearse = [], backend.rehearse

    def counted(batch):
        (num,), (length,) = batch.query_lens_host, batch.kv_lens_host
        assert batch.positions.tolist() == list(range(length - num, length))
        assert batch.token_ids.shape[0] == num
        chunks.append(WarmupChunk(num, length - num))
        return rehearse(batch)

    monkeypatch.setattr(backend, "rehearse", counted)
    storage = KVStorage(backend.kv_pools(), num_blocks=4, block_size=4, device=CPU)
    found = PromptWarmup(
        backend, storage.layers, scratch_block=storage.scratch_block, block_size=4, max_tokens=max_tokens, max_len=29, device=CPU
    )
    return _Loaded(found, storage, chunks)


def test_each_chunk_that_fits_runs_once(tmp_path, monkeypatch):
    found, storage, chunks = load_warmup(tmp_path, monkeypatch, max_tokens=29)
    with torch.inference_mode():
        assert [found.run_next() for _ in range(5)] == [True, True, True, False, False]
    assert chunks == [(5, 0), (9, 0), (4, 20)]
    for layer in storage.layers:
        for pool in layer.values():
            assert not pool[: storage.num_blocks].any()  # the blocks of requests are untouched
    assert storage.layers[-1]["k"][storage.scratch_block].any()


def test_an_idle_engine_warms_up_prompts_as_long_as_a_step_and_the_context_allow(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        TorchGqa,
        "warmup_chunks",
        lambda self, tokens, context, dtype: asked.append((tokens, context)) or [WarmupChunk(5), WarmupChunk(tokens)],
    )
    folder = tiny.write(tmp_path, tiny.LLAMA)
    for tokens, context in ((40, 60), (60, 40)):
        scheduler, cache = SchedulerConfig(max_num_seqs=8, max_step_tokens=tokens), CacheConfig(num_blocks=64)
        config = EngineConfig(
            model=str(folder), device="cpu", load_format="dummy", cache=cache, scheduler=scheduler, startup_budget_s=0
        )
        core = build_core(msgspec.structs.replace(config, max_model_len=context))
        assert [core.prepare() for _ in range(3)] == [True, True, False]
        core.close()
    # A warm-up chunk has at most as many tokens as a step and as the context may have.
    assert asked == [(40, 60), (40, 40)]


@pytest.mark.parametrize(("offline", "seconds", "num_left"), [(False, 100.0, 0), (False, 0.0, 2), (True, 100.0, 2)])
def test_the_start_prepares_within_its_budget_and_offline_not_at_all(tmp_path, monkeypatch, offline, seconds, num_left):
    monkeypatch.setattr(TorchGqa, "warmup_chunks", lambda *_: [WarmupChunk(5), WarmupChunk(9)])
    folder = str(tiny.write(tmp_path, tiny.LLAMA))
    config = EngineConfig(model=folder, device="cpu", load_format="dummy", cache=CacheConfig(num_blocks=64), offline=offline)
    core = build_core(msgspec.structs.replace(config, startup_budget_s=seconds))
    assert [core.prepare() for _ in range(num_left + 1)] == [True] * num_left + [False]
    core.close()


def test_after_the_start_a_server_uses_the_plans_that_it_has_and_an_offline_engine_may_make_others(tmp_path, monkeypatch):
    allowed = []
    monkeypatch.setattr(TorchGqa, "allow_plans", lambda self, value: allowed.append(value))
    folder = str(tiny.write(tmp_path, tiny.LLAMA))
    for offline, last in ((True, []), (False, [False])):
        config = EngineConfig(model=folder, device="cpu", load_format="dummy", cache=CacheConfig(num_blocks=64), offline=offline)
        build_core(config).close()
        assert allowed[-1:] == last


def test_there_is_a_length_of_every_kind_that_cudnn_plans():
    attention = TritonGqa(132)
    for most in (MIN_PROMPT - 1, MIN_PROMPT, MIN_PROMPT + 1, 4000, 8192):
        lengths = [chunk.num for chunk in attention.warmup_chunks(most, most, torch.bfloat16) if not chunk.cached]
        padded, last = [length for length in lengths if length % LENGTH_STEP], -(-most // LENGTH_STEP)
        assert [-(-length // LENGTH_STEP) for length in padded] == list(range(MIN_PROMPT // LENGTH_STEP + 1, last + 1))
        assert all(MIN_PROMPT <= length <= most for length in lengths)
        assert [length for length in lengths if length not in padded] == ([most] if most in (MIN_PROMPT, 8192) else [])
    assert attention.warmup_chunks(8192, 100_000, torch.float32) == []
