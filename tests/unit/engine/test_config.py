"""Tests of the engine config: the automatic choices, and the context length that the KV cache can hold."""

import msgspec
import pytest

from engine.config import CacheConfig, EngineConfig, ModelLimits, SchedulerConfig, fit_cache, resolve
from engine.errors import ConfigError

LIMITS = ModelLimits(max_model_len=1000, vocab_size=10, eos_token_ids=(), dtype="float32")


def fitted(num_blocks, asked=None):
    config = EngineConfig(model="m", max_model_len=asked, cache=CacheConfig(block_size=16))
    return fit_cache(resolve(config, LIMITS, has_cuda=False), num_blocks, asked=asked)


def test_a_large_cache_leaves_the_models_context_as_it_is():
    config = fitted(63)
    assert config.max_model_len == 1000
    assert config.cache.num_blocks == 63


def test_a_small_cache_limits_the_context():
    assert fitted(5).max_model_len == 80


def test_a_requested_context_must_fit_into_the_cache():
    assert fitted(5, asked=80).max_model_len == 80
    with pytest.raises(ConfigError, match=r"max_model_len is 81, but the KV cache holds 80 tokens \(5 blocks of 16\)") as caught:
        fitted(5, asked=81)
    assert caught.value.param == "max_model_len"


def test_offline_steps_are_larger_on_a_gpu():
    def step_tokens(*, has_cuda=True, **options):
        return resolve(EngineConfig(model="m", **options), LIMITS, has_cuda=has_cuda).scheduler.max_step_tokens

    assert step_tokens() < step_tokens(offline=True)
    assert step_tokens(offline=True, scheduler=SchedulerConfig(max_step_tokens=300)) == 300
    assert step_tokens(offline=True, has_cuda=False) == step_tokens(has_cuda=False)


def test_a_resolved_config_has_no_automatic_value_left():
    config = fitted(63)
    assert None not in (config.max_model_len, config.overlap, config.scheduler.max_step_tokens, config.cache.num_blocks)
    assert "auto" not in msgspec.to_builtins(config).values()
