"""The set of kernels that a model's steps launch on a GPU: found by planning steps, and compiled before the first real step.

The steps are planned by the same runner, programs, model and attention that run real steps, on the device "meta". Tensors there
have shapes and no memory, and a launch is noted and not run (`kernels/ahead.py`). So planning needs neither GPU nor weights.

Which kernels a step launches depends on its shape alone, by rules with few steps: buckets of row counts, lengths at which
attention changes its method. The planned steps have a shape for each step of each rule. A test plans random steps and finds
none that launches another kernel.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import msgspec
import torch
from triton import knobs

from engine.backends import torch as torch_backend
from engine.backends.rehearsal import Rehearsal
from engine.config import EngineConfig
from engine.device.graph_shapes import SIZES
from engine.device.runner import TorchRunner
from engine.device.trial_steps import TrialLimits
from engine.errors import ConfigError
from engine.kernels import kernel_folder
from engine.kernels.ahead import Variant, compile_variants, recording
from engine.kernels.hardware import Gpu
from engine.kernels.kernel_folder import KernelSet, Purpose
from engine.kvcache.storage import KVStorage
from engine.models.spec import ModelSpec
from engine.plan import AdmittedRow, StepPlan
from engine.request import SamplingParams
from engine.startup import Progress, no_report

log = logging.getLogger("tidegate.engine")

TILE = 64  # tokens: rules that count tiles change at its multiples
MOST_TILES = 16  # no rule counts more tiles of tokens
CHUNKS = (2, 16, 32, 1000, 2048)  # tokens of further planned chunks, each with and without a context and decodes
CONTEXTS = (0, 64)
DECODES = (0, 1, 16)
# (tokens, context) of long chunks that attend to a context in one, in two and in more parts (`attention/cached_context.py`). The
# chunks that attention wants to warm up are planned too, and have such parts only if the model's context is long.
LONG_CHUNKS = ((8192, 8192), (8192, 16384), (8192, 18432))
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def make_ready(spec: ModelSpec, config: EngineConfig, gpu: Gpu, progress: Progress = no_report) -> None:
    """Put the compiled kernels of the resolved `config` into Triton's cache: from `config.kernel_folder` if it has them, else by
    compiling those that the cache lacks, on all CPUs.

    A folder without a fitting set, or with a changed file, is reported in the log, and the kernels are compiled.

    Raises ConfigError if the cache cannot be written.
    """
    purpose, cache_folder = purpose_of(spec, config, gpu), Path(knobs.cache.dir)
    with _writing(cache_folder):
        if config.kernel_folder is not None and _installed(Path(config.kernel_folder), purpose, cache_folder):
            return
        known = _known(purpose, cache_folder)
        if known is not None and kernel_folder.is_complete(known, cache_folder):
            log.info("kernels: %d, compiled by an earlier start, in %s", known.num_kernels, cache_folder)
            return
        built = build(spec, config, gpu, progress)
        kernel_folder.write(built, cache_folder)
        log.info("kernels: %d compiled, in %s", built.num_kernels, cache_folder)


def build(spec: ModelSpec, config: EngineConfig, gpu: Gpu, progress: Progress = no_report) -> KernelSet:
    """Find the kernels of the resolved `config` on `gpu` and compile them into Triton's cache."""
    variants = find(spec, config, gpu, progress)
    folders = compile_variants(variants, gpu, threads=len(os.sched_getaffinity(0)), progress=progress)
    return kernel_folder.describe(purpose_of(spec, config, gpu), folders, Path(knobs.cache.dir))


def export(spec: ModelSpec, config: EngineConfig, gpu: Gpu, target: Path) -> tuple[KernelSet, int]:
    """Compile the kernels of the resolved `config` on `gpu` into the folder `target`. Returns the set and its size in bytes.

    Raises ConfigError for a model whose steps cannot be planned, and if Triton's cache cannot be written. Raises OSError, before
    anything is compiled, if `target` cannot be written.
    """
    kernel_folder.prepare(target)
    with _writing(Path(knobs.cache.dir)):
        built = build(spec, config, gpu)
    if not built.files:
        raise ConfigError("the steps of this model wait for the GPU, so its kernels cannot be found ahead of time", param="model")
    return built, kernel_folder.export(built, Path(knobs.cache.dir), target)


def purpose_of(spec: ModelSpec, config: EngineConfig, gpu: Gpu) -> Purpose:
    """Describe what the kernels of the resolved `config` on `gpu` are compiled for."""
    model = msgspec.to_builtins(spec)
    rope = model.pop("rope")
    # No kernel is compiled for a value of these. A longer context launches further kernels.
    for numbers in ("eos_token_ids", "norm_eps", "dtype", "sliding_window", "notes"):
        del model[numbers]
    return Purpose.of(
        gpu,
        model=model | {"rope": [rope["dim"], rope["interleaved"]]},
        settings={
            "dtype": config.dtype,
            "block_size": config.cache.block_size,
            "max_num_seqs": config.scheduler.max_num_seqs,
            "max_step_tokens": config.scheduler.max_step_tokens,
        },
    )


def find(spec: ModelSpec, config: EngineConfig, gpu: Gpu, progress: Progress = no_report) -> list[Variant]:
    """List the kernels that steps of the resolved `config` launch on `gpu`, each with what it is compiled for."""
    with recording(gpu) as variants, torch.inference_mode():
        planner = Planner(spec, config)
        if planner.can_plan:
            planner.run_all(progress)
        return variants


class Planner:
    """Runs steps on the device "meta", with one layer of each kind."""

    def __init__(self, spec: ModelSpec, config: EngineConfig) -> None:
        limits = spec.limits()
        config = msgspec.structs.replace(config, cuda_graphs=False, max_model_len=limits.max_model_len)
        self._backend = Rehearsal(torch_backend.plan(spec, config))
        device, block_size = torch.device("meta"), config.cache.block_size
        self._storage = KVStorage(self._backend.kv_pools(), num_blocks=1, block_size=block_size, device=device)
        self._runner = TorchRunner(self._backend, self._storage, config, limits, device=device)
        self._limits = TrialLimits(
            max_rows=config.scheduler.max_num_seqs,
            max_tokens=config.scheduler.max_step_tokens or 1,
            max_len=limits.max_model_len,
            block_size=block_size,
        )
        self._block_size = block_size

    @property
    def can_plan(self) -> bool:
        """Whether no step reads a value from the device, where planned steps have none."""
        return self._backend.graphable

    def run(self, plan: StepPlan) -> None:
        self._runner.submit(plan)

    def run_all(self, progress: Progress = no_report) -> None:
        """Run a step of every kind that launches a kernel of its own."""
        for plan in self._steps():
            self.run(plan)
            progress()
        programs = self._runner.programs()
        for key in programs.sizes.all_keys():
            programs.make(key).run()
            progress()

    def _steps(self) -> Iterator[StepPlan]:
        """Make the steps without a graph: the trial steps, decodes, and chunks with and without a context and decodes."""
        max_rows, max_tokens, max_len = self._limits.max_rows, self._limits.max_tokens, self._limits.max_len
        yield from self._limits.steps()
        for num in (*SIZES, max_rows):
            if num <= max_rows:
                yield self.plan([(2, 1)] * num, decodes=num)
        tiles = [tiles * TILE - less for tiles in range(1, MOST_TILES + 1) for less in (1, 0)]
        chunks = [*((num, 0, 0) for num in tiles), *product(CHUNKS, CONTEXTS, DECODES), *((*long, 0) for long in LONG_CHUNKS)]
        chunks += [(chunk.num, chunk.cached, 0) for chunk in self._backend.warmup_chunks(max_tokens, max_len)]
        for num, cached, decodes in chunks:
            if num + decodes <= max_tokens and cached + num <= max_len and decodes < max_rows:
                yield self.plan([*[(2, 1)] * decodes, (cached, num)], decodes=decodes)
        long_contexts = self._limits.long_contexts()
        if long_contexts is not None:
            yield long_contexts

    def plan(self, slices: list[tuple[int, int]], *, decodes: int, params: SamplingParams | None = None) -> StepPlan:
        """Make a step of `slices`, each (first position, tokens). The first `decodes` slices have one token each. All sample."""
        rows = list(range(len(slices)))
        admitted = [
            AdmittedRow(
                row,
                [0] * (start + num - (row < decodes)),
                start + num,
                [0] * -(-(start + num) // self._block_size),
                params or SamplingParams(),
                0,
            )
            for row, (start, num) in zip(rows, slices, strict=True)
        ]
        starts, nums = (list(column) for column in zip(*slices, strict=True))
        return StepPlan(0, rows=rows, starts=starts, nums=nums, num_decodes=decodes, samples=rows, admitted=admitted)


@contextmanager
def _writing(cache_folder: Path) -> Iterator[None]:
    """Raise ConfigError, naming Triton's cache, for what keeps files from being written there."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        raise ConfigError(
            f"compiled kernels cannot be written to {cache_folder}: {error}; set TRITON_CACHE_DIR to a folder that can be written"
        ) from error


def _known(purpose: Purpose, cache_folder: Path) -> KernelSet | None:
    """Read the set of an earlier start. One that cannot be read is reported, and its kernels are looked for again."""
    try:
        return kernel_folder.read(cache_folder, purpose)
    except ConfigError as error:
        log.warning("%s. The kernels that are missing are compiled now", error.message.partition(";")[0])
        return None


def _installed(source: Path, purpose: Purpose, cache_folder: Path) -> bool:
    """Install the set for `purpose` from the folder `source`. If it has none that is intact, log why and return False."""
    try:
        found = kernel_folder.read(source, purpose)
        if found is None:
            log.warning(
                "kernel_folder %s has no kernels for this start, %s. They are compiled now", source, _why(source, purpose)
            )
            return False
        kernel_folder.install(found, source, cache_folder)
    except ConfigError as error:
        log.warning("kernel_folder %s: %s. The kernels are compiled now", source, error.message)
        return False
    log.info("kernels: %d, from %s", found.num_kernels, source)
    return True


def _why(source: Path, purpose: Purpose) -> str:
    others = sorted((purpose.differences(other) for other in kernel_folder.other_purposes(source)), key=len)
    return f"but for other values of {' and '.join(others[0])}" if others else "and no others"
