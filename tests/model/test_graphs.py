"""A CPU's stand-in for CUDA graphs: what a graph would hold is run again at each replay, into the same outputs. So the steps
that graphs take, and what is read of them afterwards, are held to the plain runner's without a GPU.
"""

from __future__ import annotations

import random

import pytest
import tiny
import torch

from engine import LLM, SamplingParams
from engine.attention.triton_gqa import TritonGqa
from engine.attention.triton_mla import TritonMla
from engine.backends import torch as backend
from engine.device import graph_shapes, graphs, runner
from engine.kernels import sample_filtered
from engine.models import base
from engine.sampling.draw_rows import DrawRows
from engine.sampling.sampler import Sampler

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels take CPU tensors in the interpreter alone")

CONFIGS = {
    "llama": tiny.LLAMA | {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 1},
    "deepseek_v3": tiny.DEEPSEEK_V3
    | {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_hidden_layers": 1},
}


class _Replay:
    def __init__(self, run, outputs):
        self._run = run
        self._outputs = outputs

    def replay(self):
        for output, new in zip(self._outputs, self._run(), strict=True):
            output.copy_(new)


class _Graphs(graphs.StepGraphs):
    kinds: set[bool]  # whether a mixed step, and one of decodes alone, came

    def _capture(self, inputs, run):
        outputs = run()
        return graphs._Captured(_Replay(run, outputs), inputs, outputs)

    def run(self, slices, *rest):
        decoded = super().run(slices, *rest)
        if decoded is not None:
            self.kinds.add(bool(slices.first[-1] == slices.samples.size))
        return decoded


class _Sampler(Sampler):
    """As on CUDA: draws are the kernels'."""

    def __init__(self, *, max_rows, device, upload, **options):
        super().__init__(max_rows=max_rows, device=device, upload=upload, **options)
        self._on_device = DrawRows(max_rows, device, upload)


class _Torch:
    """torch, but nothing is pinned."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def empty(*shape, pin_memory, **options):
        return torch.empty(*shape, **options)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """The runner then leaves torch's threads as this folder's conftest set them."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def with_graphs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(graphs, "torch", _Torch())
    monkeypatch.setattr(graph_shapes, "TOKENS", (32, 48))
    monkeypatch.setattr(sample_filtered, "LOGITS_TILE", 128)
    monkeypatch.setattr(runner, "StepGraphs", _Graphs)
    monkeypatch.setattr(runner, "_use_graphs", lambda *_: True)
    monkeypatch.setattr(base, "can_group", lambda *_: True)
    monkeypatch.setattr(
        backend.select, "choose", lambda _, pools, __: TritonMla(2) if pools[0].name == "latent" else TritonGqa(2)
    )
    monkeypatch.setattr(_Graphs, "kinds", set(), raising=False)
    monkeypatch.setattr(runner, "Sampler", _Sampler)
    # On CUDA the copy is in the stream before the next replay; on a CPU nothing would be copied at all.
    monkeypatch.setattr(runner, "to_host", torch.clone)
    return _Graphs


def run(folder, **options):
    rng = random.Random(0)
    lens = [1, 13, 40, 14, 1, 62, 1, 31]
    prompts = [[rng.randrange(2, tiny.VOCAB) for _ in range(n)] for n in lens]
    params = [
        SamplingParams(max_tokens=11, temperature=0.0, ignore_eos=True),
        SamplingParams(max_tokens=12, temperature=0.8, seed=3, ignore_eos=True),
        SamplingParams(max_tokens=10, temperature=0.0, logprobs=2, ignore_eos=True),
        SamplingParams(max_tokens=11, temperature=0.9, seed=5, repetition_penalty=1.3, presence_penalty=0.4, ignore_eos=True),
        SamplingParams(max_tokens=11, temperature=0.0, min_tokens=6),
        SamplingParams(max_tokens=8, temperature=0.0, prompt_logprobs=1, ignore_eos=True),
        SamplingParams(max_tokens=11, temperature=0.0, logit_bias={5: 3.0}, ignore_eos=True),
        SamplingParams(max_tokens=11, temperature=0.9, seed=9, top_p=0.8, top_k=20, ignore_eos=True),
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
def test_steps_in_graphs_give_what_plain_steps_give(name, overlap, tmp_path, request):
    folder = tiny.write(tmp_path, CONFIGS[name], std=0.2)
    plain = run(folder)
    kinds = request.getfixturevalue("with_graphs").kinds
    found = run(folder, overlap=overlap)
    assert kinds == {True, False}
    for a, b in zip(found, plain, strict=True):
        assert a.token_ids == b.token_ids
        assert a.prompt_logprobs is None or len(a.prompt_logprobs) == len(a.prompt_token_ids)
        for mine, theirs in ((a.logprobs, b.logprobs), (a.prompt_logprobs, b.prompt_logprobs)):
            assert (mine is None) == (theirs is None)
            for p, q in zip(mine or [], theirs or [], strict=True):
                assert (p is None) == (q is None)
                assert p is None or (p.token == q.token and p.logprob == pytest.approx(q.logprob, abs=1e-3))
