"""Compiles kernels before they are launched, in parallel, for a GPU that need not be there.

    recording(gpu)      steps on the device "meta" launch nothing: each launch is noted as a Variant
    compile_variants    compiles Variants into Triton's cache, where the launches of real steps find them

A Variant is a kernel with everything that Triton compiles it for: types and alignment of its arguments, its constants, and
options such as the number of warps. Triton itself derives a Variant from a launch, so the Variants of a planned launch and of a
real one are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from triton import AsyncCompileMode, knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import FileCacheManager
from triton.runtime.jit import JITFunction

from engine.kernels.hardware import Gpu, planned_for
from engine.kernels.launchers import build_launchers
from engine.startup import Progress, no_report

_ALIGNED = 16  # bytes; Triton compiles a kernel differently for a pointer that is not on a multiple
_WARP = 32  # threads


class Variant(NamedTuple):
    """A kernel, and the JSON text by which Triton describes what to compile it for."""

    kernel: JITFunction[Any]
    description: str


@contextmanager
def recording(gpu: Gpu) -> Iterator[list[Variant]]:
    """Within this context, "meta" stands for `gpu`, and launches on it are noted in the yielded list and not run.

    Each Variant is noted once, in the order of first launches.
    """
    variants: dict[str, Variant] = {}
    real_run, real_hook = JITFunction.run, knobs.runtime.jit_cache_hook

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found = Variant(fn.jit_function, compile["specialization_data"])
        variants.setdefault(found.description, found)
        noted[:] = variants.values()
        return True  # Triton then neither compiles nor launches

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        real_run(self, *map(_stand_in, args), grid=grid, warmup=True, **{k: _stand_in(v) for k, v in options.items()})

    noted: list[Variant] = []
    with planned_for(gpu), _driver_for(gpu):
        JITFunction.run, knobs.runtime.jit_cache_hook = run, note
        try:
            yield noted
        finally:
            JITFunction.run, knobs.runtime.jit_cache_hook = real_run, real_hook


def compile_variants(variants: Sequence[Variant], gpu: Gpu, *, threads: int, progress: Progress = no_report) -> list[str]:
    """Compile `variants` for `gpu` on `threads` threads, except those that Triton's cache has. Returns the names of the folders
    of the cache that launches of the variants read.

    Most of the work is done outside of Python and in processes of the assembler and of the C compiler, so threads suffice.
    """
    folders: dict[str, None] = {}

    class Noting(FileCacheManager):  # type: ignore[misc]
        def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
            super().__init__(key, override, dump)
            folders[key] = None

    real_manager, knobs.cache.manager_class = knobs.cache.manager_class, Noting
    try:
        with _driver_for(gpu), ThreadPoolExecutor(threads) as executor:
            with AsyncCompileMode(executor):
                compiling = [variant.kernel.preload(variant.description) for variant in variants]
            build_launchers([future.result() for future in compiling], executor, progress)
    finally:
        knobs.cache.manager_class = real_manager
    return list(folders)


class _StandIn:
    """Stands for a tensor of a planned launch. Triton reads its type, and whether its first number is aligned."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self._offset = int(tensor.storage_offset()) * tensor.element_size()  # in bytes, from the start of an allocation

    def data_ptr(self) -> int:
        return self._offset % _ALIGNED


def _stand_in(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _StandIn(value)
    if isinstance(value, tuple):
        items = map(_stand_in, value)
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


class _PlannedDriver:
    """Takes the place of Triton's driver while kernels are compiled for a GPU that need not be there."""

    def __init__(self, gpu: Gpu) -> None:
        self._target = GPUTarget("cuda", 10 * gpu.capability[0] + gpu.capability[1], _WARP)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        """Return a name under which Triton keeps what it knows of this target apart from real devices."""
        return f"planned {self._target}"

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _driver_for(gpu: Gpu) -> Iterator[None]:
    driver.set_active(_PlannedDriver(gpu))
    try:
        yield
    finally:
        if torch.cuda.is_available():
            driver.reset_active()
