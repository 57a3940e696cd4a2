"""Tests of LLM with FakeRunner: completions in order, refusals, failures, and streams that the caller leaves early."""

import json

import pytest

from engine import LLM, FinishReason, SamplingParams
from engine.errors import CheckpointError, ConfigError, ContextTooLong, InvalidRequest, NumericalError
from engine.fake import expected_tokens

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "eos_token_id": 1,
    "torch_dtype": "float32",
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def fake(folder, **options):
    return LLM(folder, runner="fake", device="cpu", debug_checks=True, **options)


def test_completions_are_in_order_and_each_has_its_own_params(folder):
    prompts = [[i, i + 1] for i in range(20)]
    params = [SamplingParams(max_tokens=1 + i, seed=i, ignore_eos=True) for i in range(20)]
    indices = []
    with fake(folder, scheduler={"max_num_seqs": 3}) as llm:
        got = llm.generate(prompts, params, progress=lambda index, event: indices.extend([index] * len(event.tokens)))
        limits = llm.info.limits
    for prompt, p, completion in zip(prompts, params, got, strict=True):
        assert completion.prompt_token_ids == prompt
        assert completion.token_ids == expected_tokens(prompt, p.max_tokens, p, p.seed, limits)
        assert completion.finish_reason is FinishReason.LENGTH
        assert completion.text is None
    assert sorted(indices) == [i for i in range(20) for _ in range(1 + i)]


def test_more_prompts_than_the_queue_holds_are_submitted_as_it_empties(folder):
    with fake(folder, scheduler={"max_num_seqs": 2, "max_queue": 3}) as llm:
        got = llm.generate([[5]] * 30, SamplingParams(max_tokens=2, ignore_eos=True))
        assert [len(c.token_ids) for c in got] == [2] * 30


def test_one_bad_prompt_is_refused_before_any_runs(folder):
    with fake(folder) as llm:
        with pytest.raises(ContextTooLong):
            llm.generate([[1], [2] * 200])
        with pytest.raises(InvalidRequest, match="params has 1 entries for 2 prompts"):
            llm.generate([[1], [2]], [SamplingParams()])
        assert llm.stats().num_accepted == 0


def test_requests_are_aborted_if_a_stream_is_left_or_the_progress_callback_raises(folder):
    with fake(folder) as llm:
        events = llm.stream([1, 2], SamplingParams(max_tokens=50, ignore_eos=True))
        assert next(events).tokens
        events.close()
        with pytest.raises(ZeroDivisionError):
            llm.generate([[1], [2]], SamplingParams(max_tokens=50, ignore_eos=True), progress=lambda *_: 1 / 0)
        stats = llm.stats()
        assert (stats.running, stats.waiting, stats.num_accepted) == (0, 0, stats.num_finished + stats.num_aborted)
        assert stats.num_aborted == 3
        assert len(llm.generate([[7]], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids) == 3


def test_a_request_that_fails_raises_its_error_and_aborts_the_others(folder):
    params = SamplingParams(max_tokens=50, ignore_eos=True, temperature=0.0)
    with fake(folder) as llm:
        nan_token = llm.generate([[1, 2]], params)[0].token_ids[10]
    with fake(folder, fake={"nan_token": nan_token}) as llm:
        with pytest.raises(NumericalError, match="not finite"):
            llm.generate([[1, 2], [1, 2]], params)
        stats = llm.stats()
        assert (stats.running, stats.waiting, stats.num_failed + stats.num_aborted) == (0, 0, 2)


def test_an_unknown_option_is_an_error(folder):
    with pytest.raises(ConfigError, match="num_blok"):
        fake(folder, cache={"num_blok": 3})


def test_text_needs_a_tokenizer(folder):
    with fake(folder) as llm, pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        llm.generate(["hello"])
