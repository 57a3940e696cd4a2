"""The warm-up runs one prompt of each length that the backend requests, and writes to the scratch block only."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import tiny
import torch

from engine.attention.long_prompts import LENGTH_STEP, MIN_PROMPT
from engine.attention.torch_gqa import TorchGqa
from engine.attention.triton_gqa import TritonGqa
from engine.backends.torch import load
from engine.config import CacheConfig, EngineConfig, SchedulerConfig, resolve
from engine.core import build_core
from engine.device.warmup import PromptWarmup
from engine.kvcache.storage import KVStorage
from engine.models.families import read_spec

CPU = torch.device("cpu")


class _Loaded(NamedTuple):
    warmup: PromptWarmup
    storage: KVStorage
    lengths: list[int]  # of the prompts that have run


def load_warmup(folder, monkeypatch, *, max_tokens: int) -> _Loaded:
    config = EngineConfig(model=str(tiny.write(folder, tiny.LLAMA)), device="cpu", load_format="dummy")
    spec = read_spec(config.model)
    backend = load(spec, resolve(config, spec.limits(), has_cuda=False), CPU)
    monkeypatch.setattr(TorchGqa, "prompt_lengths", lambda self, most, dtype: [n for n in (5, 9, 30) if n <= most])
    lengths, forward = [], backend.forward

    def counted(batch):
        lengths.append(batch.token_ids.shape[0])
        return forward(batch)

    monkeypatch.setattr(backend, "forward", counted)
    storage = KVStorage(backend.kv_pools(), num_blocks=4, block_size=4, device=CPU)
    found = PromptWarmup(
        backend, storage.layers, scratch_block=storage.scratch_block, block_size=4, max_tokens=max_tokens, device=CPU
    )
    return _Loaded(found, storage, lengths)


def test_each_length_that_fits_runs_once(tmp_path, monkeypatch):
    found, storage, lengths = load_warmup(tmp_path, monkeypatch, max_tokens=29)
    with torch.inference_mode():
        assert [found.run_next() for _ in range(4)] == [True, True, False, False]
    assert lengths == [5, 9]
    for layer in storage.layers:
        for pool in layer.values():
            assert not pool[: storage.num_blocks].any()  # the blocks of requests are untouched
            assert pool[storage.scratch_block].any()


def test_an_idle_engine_warms_up_prompts_as_long_as_a_step_and_the_context_allow(tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr(TorchGqa, "prompt_lengths", lambda self, most, dtype: limits.append(most) or [5, most])
    folder = tiny.write(tmp_path, tiny.LLAMA)
    for tokens, context in ((40, 60), (60, 40)):
        scheduler, cache = SchedulerConfig(max_num_seqs=8, max_step_tokens=tokens), CacheConfig(num_blocks=64)
        config = EngineConfig(model=str(folder), device="cpu", load_format="dummy", cache=cache, scheduler=scheduler)
        core = build_core(msgspec.structs.replace(config, max_model_len=context))
        assert [core.prepare() for _ in range(3)] == [True, True, False]
        core.close()
    assert limits == [40, 40]  # the smaller one of the tokens of a step and the context length


def test_there_is_a_length_of_every_kind_that_cudnn_plans():
    attention = TritonGqa(132)
    for most in (MIN_PROMPT - 1, MIN_PROMPT, MIN_PROMPT + 1, 4000, 8192):
        lengths = attention.prompt_lengths(most, torch.bfloat16)
        padded, last = [length for length in lengths if length % LENGTH_STEP], -(-most // LENGTH_STEP)
        assert [-(-length // LENGTH_STEP) for length in padded] == list(range(MIN_PROMPT // LENGTH_STEP + 1, last + 1))
        assert all(MIN_PROMPT <= length <= most for length in lengths)
        assert [length for length in lengths if length not in padded] == ([most] if most in (MIN_PROMPT, 8192) else [])
    assert attention.prompt_lengths(8192, torch.float32) == []
