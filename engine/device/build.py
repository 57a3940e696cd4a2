"""Builds a runner from a config: loads the model, and allocates the KV cache in the memory that steps do not need."""

from __future__ import annotations

import importlib
import logging
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec
import torch

from engine.backends.base import Backend
from engine.backends.rehearsal import Rehearsal
from engine.backends.torch import load
from engine.batch import block_bytes
from engine.config import EngineConfig, ModelLimits, fit_cache, host_slots, host_stride, resolve
from engine.device.memory import CudaMemory, MemoryProbe, Trials, measure
from engine.device.moves import buffer_bytes
from engine.device.runner import TorchRunner
from engine.device.trial_steps import TrialLimits, graph_keys
from engine.errors import ConfigError
from engine.kernels import hardware
from engine.kvcache.host_memory import HostMemory
from engine.kvcache.storage import KVStorage
from engine.models.families import read_spec
from engine.models.spec import ModelSpec
from engine.plan import BuiltRunner, KVFormat, StepPlan
from engine.startup import StartupClock
from engine.weights import capacity
from engine.weights.fingerprint import fingerprint

log = logging.getLogger("tidegate.engine")

SMALLER_STEPS = "lower scheduler.max_step_tokens, scheduler.max_num_seqs or max_model_len"
MAX_BLOCKS = 1 << 18  # most KV blocks; a tiny model on a large device would never use more, and each costs host memory


def build(config: EngineConfig, clock: StartupClock | None = None) -> BuiltRunner:
    """Load the model of `config` and return its runner. Raises ConfigError for settings that cannot work on this device.

    The KV cache has `cache.num_blocks` blocks, or as many as the memory allows if that is not set.
    """
    clock = clock or StartupClock()
    spec = read_spec(config.model)
    limits = spec.limits()
    requested = config.max_model_len
    config = resolve(config, limits, has_cuda=torch.cuda.is_available())
    device = torch.device(config.device)
    if device.type == "cpu":
        torch.set_num_threads(_num_threads())
    clock.end("config")
    compiles = None
    if device.type == "cuda":  # by name, since not every machine has Triton
        compiles = importlib.import_module("engine.kernels.compiles").count(clock.progress)
        gpu = hardware.properties(device)
        importlib.import_module("engine.device.kernel_set").make_ready(spec, config, gpu, clock.progress)
    elif config.kernel_folder is not None:
        log.warning("kernel_folder has no effect: the device is the CPU, which runs no compiled kernels")
    clock.end("kernels")
    backend = _load(spec, config, device, clock)
    clock.end("weights")
    num_blocks = config.cache.num_blocks
    each = block_bytes(backend.kv_pools(), config.cache.block_size)
    fitted = fit_cache(config, num_blocks or _num_blocks(backend, config, limits), asked=requested, spill_bytes=each)
    if fitted.max_model_len != (requested or limits.max_model_len):
        log.info(
            "the context is limited to %d tokens, which the KV cache can hold; the model allows %d. With a host tier, "
            "max_model_len may be larger",
            fitted.max_model_len,
            limits.max_model_len,
        )
    storage = _allocate(backend, fitted, param="cache.num_blocks" if num_blocks else _memory_param(fitted))
    clock.end("memory")
    host = _host_memory(fitted, storage)
    runner = TorchRunner(backend, storage, fitted, limits, compiles=compiles, host=host)
    clock.end("runner")
    if not config.offline:
        _prepare(runner, config.startup_budget_s, clock)
        backend.allow_plans(False)
    clock.end("prepare")
    # Blocks that stay in this process are all of this model.
    model = "" if fitted.cache.disk_tier_folder is None else fingerprint(fitted, clock.progress)
    kv = KVFormat(model, str(backend.kv_pools()))
    return BuiltRunner(runner, fitted, limits, _describe(device), kv, host)


def _load(spec: ModelSpec, config: EngineConfig, device: torch.device, clock: StartupClock) -> Backend:
    """Load the model. Meanwhile another thread lets cuDNN load its code, if the model's steps will use it."""
    if device.type != "cuda":
        return load(spec, config, device, clock.progress)
    cudnn = importlib.import_module("engine.attention.cudnn")  # by name: it needs Triton, which not every machine has
    dtype: torch.dtype = getattr(torch, config.dtype)
    with ThreadPoolExecutor(1) as others:
        loading = others.submit(cudnn.load_library, device, dtype) if dtype in cudnn.DTYPES else None
        backend = load(spec, config, device, clock.progress)
        if loading is not None:
            loading.result()
    return backend


def _prepare(runner: TorchRunner, seconds: float, clock: StartupClock) -> None:
    """Prepare steps for `seconds`, or until nothing is left. What is left then is done while the engine is idle."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and runner.prepare():
        clock.progress()


def _allocate(backend: Backend, config: EngineConfig, *, param: str) -> KVStorage:
    """Allocate the KV cache of `cache.num_blocks` blocks. Raises ConfigError, naming `param`, if the device cannot hold it."""
    num_blocks, device, pools = config.cache.num_blocks or 0, torch.device(config.device), backend.kv_pools()
    size = (num_blocks + 1) * block_bytes(pools, config.cache.block_size)
    try:
        if size > sys.maxsize:
            raise MemoryError
        return KVStorage(pools, num_blocks=num_blocks, block_size=config.cache.block_size, device=device)
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        hint = ", or leave it unset to use the memory that is free" if param == "cache.num_blocks" else ""
        raise ConfigError(
            f"{param} is too large: a KV cache of {num_blocks} blocks takes {_gib(size)}, which device {config.device!r} does "
            f"not have beside the model. Set a smaller {param}{hint}",
            param=param,
        ) from error


def _num_blocks(backend: Backend, config: EngineConfig, limits: ModelLimits) -> int:
    """Compute how many KV blocks fit into `cache.host_bytes` on a CPU, or into a fraction of the free device memory on CUDA."""
    each, param = block_bytes(backend.kv_pools(), config.cache.block_size), _memory_param(config)
    if config.device == "cpu":
        available, remedy = config.cache.host_bytes, "raise it"
    else:
        free = _free_on_cuda(backend, config, limits) - buffer_bytes(each, (config.cache.host_tier_bytes or 0) // each)
        available = int(config.cache.memory_fraction * free)
        remedy = f"raise it, or {SMALLER_STEPS}"
    if available < each:
        raise ConfigError(
            f"{param} leaves {max(0, available)} bytes for the KV cache, and one block takes {each}: {remedy}", param=param
        )
    return min(available // each, MAX_BLOCKS)


def _host_memory(config: EngineConfig, storage: KVStorage) -> HostMemory | None:
    """Return the memory of the host tier, or None if there is no tier. Raises ConfigError if it is too small or too large.

    On a CPU the KV cache lies in the same memory, whose pages are taken as they are written to.
    """
    free, size, beside = capacity.free_bytes(torch.device("cpu")), config.cache.host_tier_bytes or 0, ""
    if free is not None and config.device == "cpu":
        kv_bytes = storage.num_blocks * storage.record_bytes
        free, beside = max(0, free - kv_bytes), f" beside the KV cache of {kv_bytes}"
    if free is not None and size > free:
        raise ConfigError(
            f"cache.host_tier_bytes is {size}, and the host has {free} bytes free{beside}: set a smaller one",
            param="cache.host_tier_bytes",
        )
    slots = host_slots(config, storage.record_bytes)
    return HostMemory(slots, storage.record_bytes, host_stride(config, storage.record_bytes)) if slots else None


def _memory_param(config: EngineConfig) -> str:
    """Return the name of the setting that decides the size of the KV cache if `cache.num_blocks` is not set."""
    return "cache.host_bytes" if config.device == "cpu" else "cache.memory_fraction"


def _free_on_cuda(backend: Backend, config: EngineConfig, limits: ModelLimits) -> int:
    """Measure the free bytes of the CUDA device by `free_beside_steps`. Raises ConfigError if the largest steps do not fit."""
    try:
        return free_beside_steps(backend, config, limits, CudaMemory())
    except torch.cuda.OutOfMemoryError as error:
        raise ConfigError(
            f"scheduler.max_step_tokens is {config.scheduler.max_step_tokens}, and the largest step does not fit into the device "
            f"memory beside the model: {SMALLER_STEPS}",
            param="scheduler.max_step_tokens",
        ) from error
    finally:
        torch.cuda.empty_cache()


@torch.inference_mode()
def free_beside_steps(backend: Backend, config: EngineConfig, limits: ModelLimits, probe: MemoryProbe) -> int:
    """Measure the bytes of device memory that no step uses, by running the largest steps and capturing CUDA graphs."""
    block_size, device = config.cache.block_size, torch.device(config.device)
    storage = KVStorage(backend.kv_pools(), num_blocks=1, block_size=block_size, device=device)
    eager = TorchRunner(Rehearsal(backend), storage, msgspec.structs.replace(config, cuda_graphs=False), limits)
    graphs = TorchRunner(backend, storage, config, limits).graphs
    # No request can have more tokens than a KV cache in all free memory would hold.
    held = max(1, probe.free() // block_bytes(backend.kv_pools(), block_size)) * block_size
    sizes = TrialLimits(
        max_rows=config.scheduler.max_num_seqs,
        max_tokens=config.scheduler.max_step_tokens or 1,
        max_len=min(config.max_model_len or limits.max_model_len, held),
        block_size=block_size,
    )
    long_contexts = sizes.long_contexts()
    keys = [] if graphs is None else graphs.keys
    trials = Trials(
        steps=[partial(_run, eager, plan) for plan in sizes.steps()],
        long_context=None if long_contexts is None else partial(_run, eager, long_contexts),
        captures=[] if graphs is None else [partial(graphs.capture, key) for key in graph_keys(keys)],
        num_graphs=len(keys),
    )
    needs, free = measure(probe, trials), probe.free()
    log.info(
        "%s are free beside weights and captured graphs; of them steps need %s, long contexts %s and other graphs %s",
        *map(_gib, (free, needs.step, needs.long_context, needs.graphs)),
    )
    return free - needs.total


def _run(runner: TorchRunner, plan: StepPlan) -> None:
    runner.submit(plan).result()


def _num_threads() -> int:
    """Choose torch's number of threads: OMP_NUM_THREADS if it is set, else the number of CPUs that this process may use."""
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = Path("/sys/fs/cgroup/cpu.max")  # holds "quota period" in microseconds, or "max period"
    quota, period = limit.read_text().split() if limit.exists() else ("max", "1")
    return available if quota == "max" else max(1, min(available, math.ceil(int(quota) / int(period))))


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.2f} GiB"
