"""Tests of the engine config: the automatic choices, and the context length that the KV cache can hold."""

import msgspec
import pytest

from engine.config import (
    HOST_BYTES_FOR_DISK,
    BatchingConfig,
    CacheConfig,
    EngineConfig,
    FakeConfig,
    ModelLimits,
    SchedulerConfig,
    fit_cache,
    host_slots,
    resolve,
)
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


def spilling(num_blocks, host_tier_bytes, asked=None):
    """Return the config for a host tier of blocks of 100 bytes, into which contexts may continue."""
    config = EngineConfig(model="m", max_model_len=asked, cache=CacheConfig(block_size=16, host_tier_bytes=host_tier_bytes))
    return fit_cache(resolve(config, LIMITS, has_cuda=False), num_blocks, asked=asked, spill_bytes=100)


def test_a_context_that_is_asked_for_may_exceed_the_cache_by_what_the_host_tier_holds():
    assert spilling(5, 399, asked=128).max_model_len == 128  # 5 blocks and 3 slots
    with pytest.raises(ConfigError) as caught:
        spilling(5, 399, asked=129)
    assert "the KV cache holds 80 tokens (5 blocks of 16), and the host tier 48 more" in caught.value.message
    assert "cache.host_tier_bytes is 399" in caught.value.message
    assert "set cache.host_tier_bytes to at least 400" in caught.value.message
    assert spilling(5, 400, asked=129).max_model_len == 129


def test_a_context_that_is_left_open_ends_with_the_cache_also_beside_a_host_tier():
    assert spilling(5, 10_000).max_model_len == 80


def test_the_newest_tokens_that_stay_on_the_device_are_at_least_one():
    with pytest.raises(ConfigError, match=r"cache\.resident_tokens is 0: it must be at least 1"):
        resolve(EngineConfig(model="m", cache=CacheConfig(resident_tokens=0)), LIMITS, has_cuda=False)


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


@pytest.mark.parametrize(
    ("batching", "param", "message"),
    [
        ({"min_batch": 0}, "min_batch", "batching.min_batch is 0: it must be at least 1"),
        ({"min_batch": 9, "max_batch": 8}, "max_batch", "batching.max_batch is 8, and batching.min_batch is 9"),
        ({"step_low_ms": 50.0, "step_high_ms": 50.0}, "step_low_ms", "step_low_ms must be the smaller one"),
        ({"step_low_ms": 0.0}, "step_low_ms", "batching.step_low_ms is 0.0: set a finite number of milliseconds above 0"),
        ({"step_high_ms": float("nan")}, "step_high_ms", "batching.step_high_ms is nan: set a finite number"),
        ({"step_high_ms": float("inf")}, "step_high_ms", "batching.step_high_ms is inf: set a finite number"),
        ({"policy": "model"}, "cost_file", "batching.policy is 'model', but batching.cost_file is not set"),
    ],
)
def test_impossible_targets_are_refused(batching, param, message):
    with pytest.raises(ConfigError) as caught:
        resolve(EngineConfig(model="m", batching=BatchingConfig(**batching)), LIMITS, has_cuda=False)
    assert caught.value.param == f"batching.{param}"
    assert message in caught.value.message


def test_a_simulated_device_has_either_a_cost_file_or_durations():
    fake = FakeConfig(cost_file="some.json", token_us=1.0)
    with pytest.raises(ConfigError, match=r"fake\.cost_file is set beside fake\.step_ms or fake\.token_us") as caught:
        resolve(EngineConfig(model="m", fake=fake), LIMITS, has_cuda=False)
    assert caught.value.param == "fake.cost_file"


DISK = {"disk_tier_folder": "/kv", "disk_tier_bytes": 1 << 30}


@pytest.mark.parametrize(
    ("cache", "param", "message"),
    [
        (
            {"host_tier_bytes": 5, "prefix_caching": False},
            "host_tier_bytes",
            r"cache\.host_tier_bytes is 5, and cache\.prefix_caching is off: .* or set host_tier_bytes to 0",
        ),
        (
            {"disk_tier_bytes": 5},
            "disk_tier_bytes",
            r"cache\.disk_tier_bytes is set, and cache\.disk_tier_folder is not: name the folder .*, or unset disk_tier_bytes",
        ),
        (
            {"disk_tier_write_rate": 1.0},
            "disk_tier_write_rate",
            r"cache\.disk_tier_write_rate is set, and cache\.disk_tier_folder is not",
        ),
        (
            {"disk_tier_key_file": "/key"},
            "disk_tier_key_file",
            r"cache\.disk_tier_key_file is set, and cache\.disk_tier_folder is not",
        ),
        (
            DISK | {"prefix_caching": False},
            "disk_tier_folder",
            r"cache\.disk_tier_folder is set, and cache\.prefix_caching is off: .* or unset disk_tier_folder",
        ),
        (
            DISK | {"host_tier_bytes": 0},
            "host_tier_bytes",
            r"and cache\.host_tier_bytes is 0: records of the disk .* Raise host_tier_bytes, or leave it unset",
        ),
        (
            {"disk_tier_folder": "/kv"},
            "disk_tier_bytes",
            r"cache\.disk_tier_folder is set, and cache\.disk_tier_bytes is not: set how many bytes its files may take",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_settings_of_tiers_that_contradict_each_other_are_refused(cache, param, message):
    with pytest.raises(ConfigError, match=message) as error:
        resolve(EngineConfig(model="m", cache=CacheConfig(**cache)), LIMITS, has_cuda=False)
    assert error.value.param == f"cache.{param}"


def test_a_disk_tier_has_a_host_tier_that_was_not_asked_for():
    def host_bytes(**cache):
        return resolve(EngineConfig(model="m", cache=CacheConfig(**cache)), LIMITS, has_cuda=False).cache.host_tier_bytes

    assert host_bytes() == 0
    assert host_bytes(**DISK) == HOST_BYTES_FOR_DISK
    assert host_bytes(**DISK, host_tier_bytes=5) == 5


def test_slots_of_the_host_are_whole_pages_beside_a_disk():
    def slots(**cache):
        return host_slots(resolve(EngineConfig(model="m", cache=CacheConfig(**cache)), LIMITS, has_cuda=False), 5000)

    assert slots(host_tier_bytes=3 * 5000) == 3
    assert slots(host_tier_bytes=3 * 5000, **DISK) == 1
    assert slots() == 0
    with pytest.raises(ConfigError, match=r"cache\.host_tier_bytes is 8191, and one block takes 8192: raise it") as error:
        slots(host_tier_bytes=8191, **DISK)
    assert error.value.param == "cache.host_tier_bytes"
