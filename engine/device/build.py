"""From a config to a runner: its model with weights, and a KV cache as large as the memory allows."""

from __future__ import annotations

import importlib
import logging
import math
import os
from pathlib import Path

import msgspec
import torch

from engine.backends.base import Backend
from engine.backends.torch import load
from engine.config import EngineConfig, ModelLimits, fit_cache, resolve
from engine.device.runner import TorchRunner
from engine.errors import ConfigError
from engine.kvcache.storage import KVStorage, block_bytes
from engine.models.spec import ModelSpec
from engine.plan import AdmittedRow, BuiltRunner, StepPlan
from engine.request import SamplingParams
from engine.startup import StartupClock

log = logging.getLogger("tidegate.engine")

MAX_BLOCKS = 1 << 18  # a tiny model on a large device: more blocks than anyone fills would only cost the host memory


def build(config: EngineConfig, clock: StartupClock | None = None) -> BuiltRunner:
    """The runner of `config`: its model with weights, and a cache as large as the memory allows."""
    clock = clock or StartupClock()
    spec = ModelSpec.from_folder(config.model)
    limits = spec.limits()
    asked = config.max_model_len
    config = resolve(config, limits, has_cuda=torch.cuda.is_available())
    device = torch.device(config.device)
    if device.type == "cpu":
        torch.set_num_threads(_num_threads())
    clock.end("config")
    if device.type == "cuda":
        importlib.import_module("engine.kernels.compiles").report(clock.progress)  # not every machine has Triton
    backend = load(spec, config, device, clock.progress)
    clock.end("weights")
    pools = backend.kv_pools()
    num_blocks = config.cache.num_blocks or _num_blocks(backend, config, limits)
    config = fit_cache(config, num_blocks, asked=asked)
    if config.max_model_len != (asked or limits.max_model_len):
        log.info(
            "the context is %d tokens, what the KV cache can hold; the model's is %d", config.max_model_len, limits.max_model_len
        )
    storage = KVStorage(pools, num_blocks=num_blocks, block_size=config.cache.block_size, device=device)
    clock.end("memory")
    runner = TorchRunner(backend, storage, config, limits)
    clock.end("runner")
    return BuiltRunner(runner, config, limits, _describe(device))


def _num_blocks(backend: Backend, config: EngineConfig, limits: ModelLimits) -> int:
    """How many blocks the cache can have: on the CPU those of `host_bytes`; on CUDA a fraction of what a full step leaves."""
    each = block_bytes(backend.kv_pools(), config.cache.block_size)
    if config.device == "cpu":
        param, available = "cache.host_bytes", config.cache.host_bytes
    else:
        param, available = (
            "cache.memory_fraction",
            int(config.cache.memory_fraction * _free_beside_a_step(backend, config, limits)),
        )
    if available // each > MAX_BLOCKS:
        return MAX_BLOCKS
    if available < each:
        raise ConfigError(f"{param} leaves {available} bytes for the KV cache, and one block has {each}", param=param)
    return available // each


def _free_beside_a_step(backend: Backend, config: EngineConfig, limits: ModelLimits) -> int:
    """Bytes of CUDA memory that are free while a step of `max_step_tokens` runs, measured by running one."""
    plan, num_blocks = _largest_step(config, limits)
    storage = KVStorage(
        backend.kv_pools(), num_blocks=num_blocks, block_size=config.cache.block_size, device=torch.device(config.device)
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    plainly = msgspec.structs.replace(config, cuda_graphs=False)  # a graph would be of this storage
    TorchRunner(backend, storage, plainly, limits).submit(plan).result()
    peak = torch.cuda.max_memory_allocated() - before
    del storage
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0]) - peak


def _largest_step(config: EngineConfig, limits: ModelLimits) -> tuple[StepPlan, int]:
    """A plan that fills the budget with as many rows as there are, each drawing a token; and the blocks that it needs."""
    rows, budget = config.scheduler.max_num_seqs, config.scheduler.max_step_tokens or 1
    each = max(1, min(budget // rows, (config.max_model_len or limits.max_model_len) - 1))
    width = math.ceil(each / config.cache.block_size)
    admitted = [
        AdmittedRow(row, [0] * each, each, list(range(row * width, (row + 1) * width)), SamplingParams(top_p=0.9), 0)
        for row in range(rows)
    ]
    plan = StepPlan(0, list(range(rows)), [0] * rows, [each] * rows, 0, list(range(rows)), admitted, [], [])
    return plan, rows * width


def _num_threads() -> int:
    """Threads for torch: what OMP_NUM_THREADS says, else the CPUs that this process may use."""
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = Path("/sys/fs/cgroup/cpu.max")  # "quota period" in microseconds, or "max period"
    quota, period = limit.read_text().split() if limit.exists() else ("max", "1")
    return available if quota == "max" else max(1, min(available, math.ceil(int(quota) / int(period))))


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
