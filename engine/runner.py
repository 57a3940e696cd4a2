"""TorchRunner: executes plans on a device, one after the other in the order they come.

    plan -> block copies -> ForwardBatch -> backend.forward -> logits of the positions that sample -> sampler
                                ^                                                                        |
                                '--- each row's latest token, on the device <----------------------------'

Nothing in `submit` waits for the device, so with overlap the next plan is on its way while this one runs; the order of the
device's stream is what makes that right. `result` waits for the copy of the tokens, and for nothing that came later.
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engine.backends.base import Backend
from engine.backends.torch import load
from engine.config import EngineConfig, ModelLimits, fit_cache, resolve
from engine.errors import ConfigError
from engine.graphs import DecodeGraphs
from engine.inputs import Ints, Rows, Slices, Uploader
from engine.kvcache.storage import KVStorage, block_bytes
from engine.models.spec import ModelSpec
from engine.plan import AdmittedRow, BuiltRunner, PendingStep, StepPlan, StepResult
from engine.request import SamplingParams
from engine.sampling.logprobs import LogprobTensors, of_prompt, to_records
from engine.sampling.sampler import Sampler

log = logging.getLogger("tidegate.engine")

MAX_BLOCKS = 1 << 18  # a tiny model on a large device: more blocks than anyone fills would only cost the host memory


class TorchRunner:
    """`config` is resolved."""

    def __init__(self, backend: Backend, storage: KVStorage, config: EngineConfig, limits: ModelLimits) -> None:
        device = torch.device(config.device)
        max_rows = config.scheduler.max_num_seqs
        self._backend = backend
        self._storage = storage
        self._forward = _graphs(backend, storage, config, limits).forward if _use_graphs(backend, config) else backend.forward
        self._upload = Uploader(device)
        self._rows = Rows(
            max_rows=max_rows,
            max_len=config.max_model_len or limits.max_model_len,
            block_size=config.cache.block_size,
            device=device,
            upload=self._upload,
        )
        self._sampler = Sampler(
            max_rows=max_rows,
            vocab_size=limits.vocab_size,
            eos_token_ids=limits.eos_token_ids,
            device=device,
            upload=self._upload,
        )
        self._vocab_size = limits.vocab_size

    @property
    def num_blocks(self) -> int:
        return self._storage.num_blocks

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> PendingStep:
        self._storage.copy(plan.copies, self._upload)
        for admitted in plan.admitted:
            self._sampler.admit(admitted)
        slices = Slices.of(plan)
        inputs = self._rows.step(plan, slices, self._storage.layers)
        hidden = self._forward(inputs.batch)
        pending = _Pending(plan.step, on_cuda=hidden.is_cuda)
        self._prompt_logprobs(hidden, slices, pending)
        if plan.samples:
            last = hidden if inputs.last_index is None else hidden.index_select(0, inputs.last_index)
            sampled_rows = slices.rows[slices.samples]
            sampled = self._sampler.sample(self._backend.logits(last), sampled_rows, slices.ends[slices.samples])
            self._rows.set_latest(inputs.sampled_rows, sampled.tokens)
            pending.tokens = _to_host(sampled.tokens)
            if sampled.logprobs is not None:
                which = slices.samples[sampled.logprob_rows].tolist()
                pending.logprobs = _Reported(which, sampled.num_top, LogprobTensors(*map(_to_host, sampled.logprobs)))
        pending.submitted()
        return pending

    def close(self) -> None:
        self._backend.close()

    def _prompt_logprobs(self, hidden: torch.Tensor, slices: Slices, pending: _Pending) -> None:
        """For each slice that lies in a prompt whose log-probabilities are wanted: those of the tokens after its positions."""
        records = self._sampler.params.table[slices.rows]
        wanting = np.flatnonzero(records["wants_prompt_logprobs"] & (slices.starts < records["num_prompt"]))
        if not wanting.size:
            return
        # A slice that ends the prompt says nothing of the token after it: that one is sampled.
        nums: Ints = np.minimum(slices.ends, records["num_prompt"] - 1)[wanting] - slices.starts[wanting]
        tops = records["prompt_logprobs"][wanting]
        which = [i for i, num in zip(wanting.tolist(), nums.tolist(), strict=True) for _ in range(num)]
        pending.prompt_slices = wanting.tolist()
        if not which:
            return
        spans = [(i, int(num)) for i, num in zip(wanting.tolist(), nums, strict=True)]
        index = np.concatenate([np.arange(slices.first[i], slices.first[i] + num) for i, num in spans])
        tokens = np.concatenate(
            [self._rows.tokens[slices.rows[i]][slices.starts[i] + 1 : slices.starts[i] + 1 + num] for i, num in spans]
        )
        on_device = self._upload([index, tokens])
        found = of_prompt(
            hidden.index_select(0, on_device[0]), on_device[1], int(tops.max()), self._vocab_size, self._backend.logits
        )
        pending.prompt_logprobs = _Reported(which, np.repeat(tops, nums).tolist(), LogprobTensors(*map(_to_host, found)))


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host, on its way: it may be read once the step is done."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class _Reported(NamedTuple):
    slices: list[int]  # of the plan, one for each position
    num_top: list[int]
    values: LogprobTensors  # on the host, once the step is done


class _Pending:
    """PendingStep."""

    def __init__(self, step: int, *, on_cuda: bool) -> None:
        self._step = step
        self._on_cuda = on_cuda
        self._done: torch.cuda.Event | None = None
        self.tokens: torch.Tensor | None = None
        self.logprobs: _Reported | None = None
        self.prompt_logprobs: _Reported | None = None
        self.prompt_slices: list[int] = []

    def submitted(self) -> None:
        """All of the step, copies to the host included, is in the stream."""
        if self._on_cuda:
            self._done = torch.cuda.current_stream().record_event()

    def result(self) -> StepResult:
        if self._done is not None:
            self._done.synchronize()
        result = StepResult(self._step, [] if self.tokens is None else self.tokens.tolist(), {}, {})
        if self.logprobs is not None:
            records = to_records(self.logprobs.values, self.logprobs.num_top)
            result.logprobs = dict(zip(self.logprobs.slices, records, strict=True))
        result.prompt_logprobs = {s: [] for s in self.prompt_slices}
        if self.prompt_logprobs is not None:
            records = to_records(self.prompt_logprobs.values, self.prompt_logprobs.num_top)
            for s, record in zip(self.prompt_logprobs.slices, records, strict=True):
                result.prompt_logprobs[s].append(record)
        return result


def build(config: EngineConfig) -> BuiltRunner:
    """The runner of `config`: its model with weights, and a cache as large as the memory allows."""
    spec = ModelSpec.from_folder(config.model)
    limits = spec.limits()
    asked = config.max_model_len
    config = resolve(config, limits, has_cuda=torch.cuda.is_available())
    device = torch.device(config.device)
    if device.type == "cpu":
        torch.set_num_threads(_num_threads())
    backend = load(spec, config, device)
    pools = backend.kv_pools()
    num_blocks = config.cache.num_blocks or _num_blocks(backend, config, limits)
    config = fit_cache(config, num_blocks, asked=asked)
    if config.max_model_len != (asked or limits.max_model_len):
        log.info(
            "the context is %d tokens, what the KV cache can hold; the model's is %d", config.max_model_len, limits.max_model_len
        )
    storage = KVStorage(pools, num_blocks=num_blocks, block_size=config.cache.block_size, device=device)
    return BuiltRunner(TorchRunner(backend, storage, config, limits), config, limits, _describe(device))


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
    TorchRunner(backend, storage, config, limits).submit(plan).result()
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


def _use_graphs(backend: Backend, config: EngineConfig) -> bool:
    possible = config.device == "cuda" and backend.graphable
    if config.cuda_graphs and not possible:
        raise ConfigError(
            "cuda_graphs is on, but this model cannot be captured here: it takes CUDA, and bfloat16 where the model has "
            "experts. Leave cuda_graphs unset to use them where they can be",
            param="cuda_graphs",
        )
    return possible if config.cuda_graphs is None else config.cuda_graphs


def _graphs(backend: Backend, storage: KVStorage, config: EngineConfig, limits: ModelLimits) -> DecodeGraphs:
    size = config.cache.block_size
    return DecodeGraphs(
        backend,
        storage.layers,
        max_rows=config.scheduler.max_num_seqs,
        width=math.ceil((config.max_model_len or limits.max_model_len) / size),
        block_size=size,
        scratch_block=storage.scratch_block,
        device=torch.device(config.device),
    )


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
