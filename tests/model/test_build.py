"""Tests the size of the KV cache: a cache that the device cannot hold is refused by the name of the setting, and free memory is
used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import graph_stand_in
import msgspec
import pytest
import tiny
import torch

from engine.backends.torch import load
from engine.config import CacheConfig, EngineConfig, SchedulerConfig, resolve
from engine.device.build import build, free_beside_steps
from engine.device.step_programs import StepPrograms
from engine.errors import ConfigError
from engine.models.families import read_spec

BLOCK = 4
FREE = 1 << 30  # free bytes of the simulated device
BLOCK_BYTES = BLOCK * 3 * 2 * 2 * 8 * 4  # bytes of a block: tokens x layers x (K and V) x heads x head size x 4 bytes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Keep the runner from changing the number of torch's threads, which this folder's conftest sets."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def config(tmp_path):
    folder = tiny.write(tmp_path, tiny.LLAMA)

    def make(**cache):
        return EngineConfig(model=str(folder), device="cpu", cache=CacheConfig(block_size=BLOCK, **cache))

    return make


def test_a_cpu_needs_no_triton(config):
    """`make serve` installs no Triton: an engine on a CPU must start and generate without it."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from engine import LLM, SamplingParams\n"
        "with LLM(sys.argv[1], device='cpu', cache={'num_blocks': 8}) as llm:\n"
        "    print(len(llm.generate([[1, 2]], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, config().model], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "3\n", done.stderr[-2000:]


def test_a_folder_of_kernels_for_a_cpu_is_reported(config, caplog):
    with caplog.at_level("WARNING", logger="tidegate.engine"):
        build(msgspec.structs.replace(config(num_blocks=8), kernel_folder="/kernels"))
    assert "kernel_folder has no effect: the device is the CPU" in caplog.text


def test_keys_of_the_config_that_have_no_effect_are_in_the_log(tmp_path, caplog):
    folder = tiny.write(tmp_path, {**tiny.LLAMA, "my_dataset": "x"})
    with caplog.at_level("WARNING", logger="tidegate.engine"):
        build(EngineConfig(model=str(folder), device="cpu", cache=CacheConfig(block_size=BLOCK, num_blocks=9)))
    assert "these keys have no effect here: my_dataset" in caplog.text


def test_a_context_longer_than_the_sliding_window_is_refused_with_the_remedy(tmp_path):
    folder = tiny.write(tmp_path, {**tiny.LLAMA, "sliding_window": 20})
    config = EngineConfig(model=str(folder), device="cpu", cache=CacheConfig(block_size=BLOCK, num_blocks=9))
    with pytest.raises(ConfigError, match="set max_model_len to at most 20"):
        build(config)
    assert build(msgspec.structs.replace(config, max_model_len=20)).config.max_model_len == 20


@pytest.mark.parametrize("num_blocks", [10**12, 10**14, 10**15, 10**19, 10**30])
def test_more_blocks_than_the_device_holds_are_refused_by_name(config, num_blocks):
    with pytest.raises(
        ConfigError, match=rf"^cache\.num_blocks is too large: a KV cache of {num_blocks} blocks takes .* GiB"
    ) as refused:
        build(config(num_blocks=num_blocks))
    assert refused.value.param == "cache.num_blocks"


def test_more_host_bytes_than_there_are_are_refused_by_name(config, monkeypatch):
    monkeypatch.setattr("engine.device.build.MAX_BLOCKS", 10**30)
    with pytest.raises(ConfigError, match=r"^cache\.host_bytes is too large") as refused:
        build(config(host_bytes=10**18))
    assert refused.value.param == "cache.host_bytes"


def test_host_bytes_below_one_block_are_refused_by_name(config):
    with pytest.raises(
        ConfigError, match=rf"cache\.host_bytes leaves {BLOCK_BYTES - 1} bytes .* one block takes {BLOCK_BYTES}: raise it"
    ):
        build(config(host_bytes=BLOCK_BYTES - 1))


@pytest.mark.parametrize(("host_bytes", "expected"), [(BLOCK_BYTES, 1), (10 * BLOCK_BYTES + 5, 10)])
def test_the_cache_has_as_many_blocks_as_fit_into_host_bytes(config, host_bytes, expected):
    built = build(config(host_bytes=host_bytes))
    assert built.runner.num_blocks == built.config.cache.num_blocks == expected
    assert built.config.max_model_len == expected * BLOCK


class Probe:
    """A MemoryProbe that runs the trial steps and reports given amounts of free memory and of peak memory."""

    def __init__(self, *, free: int, peaks: list[int]) -> None:
        self._free = free
        self.peaks = peaks

    def free(self) -> int:
        return self._free

    def peak(self, run) -> int:
        run()
        return self.peaks.pop(0)


@pytest.mark.parametrize("name", sorted(tiny.CONFIGS))
@pytest.mark.parametrize(("max_len", "expected"), [(500, FREE - 40 - 7), (30, FREE - 40)], ids=["long contexts", "short"])
def test_the_largest_steps_run_before_the_cache_is_sized(name, max_len, expected, tmp_path):
    scheduler = SchedulerConfig(max_num_seqs=5, max_step_tokens=64)
    config = EngineConfig(
        model=str(tiny.write(tmp_path, tiny.CONFIGS[name])), device="cpu", scheduler=scheduler, max_model_len=max_len
    )
    spec = read_spec(config.model)
    config = resolve(config, spec.limits(), has_cuda=False)
    # If the context is longer than a step, there are two more trials: a long chunk, and chunks at the end of the longest
    # contexts.
    probe = Probe(free=FREE, peaks=[20, 40, 30, 35, 7] if max_len > 64 else [20, 40, 30])
    assert free_beside_steps(load(spec, config, torch.device("cpu")), config, spec.limits(), probe) == expected
    assert probe.peaks == []


def test_a_context_that_free_memory_cannot_hold_is_not_tried(tmp_path):
    """A small device must not run out of memory in a trial step for a context that the device's KV cache will not hold."""
    scheduler, cache = SchedulerConfig(max_num_seqs=5, max_step_tokens=64), CacheConfig(block_size=BLOCK)
    config = EngineConfig(model=str(tiny.write(tmp_path, tiny.LLAMA)), device="cpu", scheduler=scheduler, cache=cache)
    spec = read_spec(config.model)
    config = resolve(config, spec.limits(), has_cuda=False)
    for blocks, num_trials in ((16, 3), (17, 5)):  # free blocks: a context of one step (3 trials), and a longer one (5)
        probe = Probe(free=blocks * BLOCK_BYTES, peaks=[1, 1, 1, 1, 1])
        free_beside_steps(load(spec, config, torch.device("cpu")), config, spec.limits(), probe)
        assert len(probe.peaks) == 5 - num_trials


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels take CPU tensors in the interpreter only")
def test_the_largest_graph_is_captured_before_the_cache_is_sized_and_first_of_all(tmp_path, monkeypatch):
    graph_stand_in.install(monkeypatch)
    captured = []
    make = StepPrograms.make
    monkeypatch.setattr(StepPrograms, "make", lambda self, key: captured.append(key) or make(self, key))
    scheduler = SchedulerConfig(max_num_seqs=3, max_step_tokens=64)
    folder = tiny.write(tmp_path, tiny.LLAMA | {"hidden_size": 64, "head_dim": 16, "num_hidden_layers": 1})
    config = EngineConfig(
        model=str(folder), device="cpu", scheduler=scheduler, cache=CacheConfig(block_size=16), max_model_len=64
    )
    spec = read_spec(folder)
    config = resolve(config, spec.limits(), has_cuda=False)
    probe = Probe(free=FREE, peaks=[20, 40, 30])
    assert free_beside_steps(load(spec, config, torch.device("cpu")), config, spec.limits(), probe) == FREE - 40
    assert captured == [(1, 0), (48, 4), (3, 0), (2, 0), (32, 4)]


@pytest.mark.parametrize(("size", "slots"), [(0, 0), (BLOCK_BYTES, 1), (10 * BLOCK_BYTES + 5, 10)])
def test_the_host_tier_has_as_many_slots_as_fit_into_its_bytes(config, size, slots):
    host = build(config(num_blocks=8, host_tier_bytes=size)).host
    assert (host.num_slots if host else 0) == slots


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ({"host_tier_bytes": BLOCK_BYTES - 1}, f"is {BLOCK_BYTES - 1}, and one block takes {BLOCK_BYTES}"),
        ({"host_tier_bytes": 1 << 60}, f"bytes free beside the KV cache of {8 * BLOCK_BYTES}: set a smaller one"),
        ({"host_tier_bytes": 1 << 20, "prefix_caching": False}, "Turn prefix_caching on"),
        ({"host_tier_bytes": -1}, "it must be at least 0"),
    ],
)
def test_a_host_tier_that_cannot_work_is_refused_by_name(config, cache, message):
    with pytest.raises(ConfigError, match=message) as refused:
        build(config(num_blocks=8, **cache))
    assert refused.value.param == "cache.host_tier_bytes"
