"""Builds the C functions by which Triton launches kernels, without loading them. Older versions need one for each signature.

Loading one needs the CUDA driver, and linking one needs the driver's library, or a file of its name.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from triton import knobs

from engine.errors import ConfigError
from engine.startup import Progress


def build_launchers(kernels: Sequence[Any], executor: Executor, progress: Progress) -> None:
    """Build the launchers of `kernels`, Triton's CompiledKernels, into Triton's cache, and the module that calls the driver.

    Does nothing with a Triton that needs no such modules. Raises ConfigError without a C compiler.
    """
    nvidia = importlib.import_module("triton.backends.nvidia.driver")
    if not hasattr(nvidia, "make_launcher"):
        return
    with _unloaded(), _linkable():
        for _ in executor.map(partial(_build_one, nvidia), kernels):
            progress()
        nvidia.compile_module_from_src(
            src=(Path(nvidia.dirname) / "driver.c").read_text(),
            name="cuda_utils",
            library_dirs=nvidia.library_dirs(),
            include_dirs=nvidia.include_dirs,
            libraries=nvidia.libraries,
        )


def _build_one(nvidia: Any, kernel: Any) -> None:
    nvidia.CudaLauncher(kernel.src, kernel.metadata)


@contextmanager
def _unloaded() -> Iterator[None]:
    """Within this context, Triton does not load the modules that it builds."""
    build: Any = importlib.import_module("triton.runtime.build")
    real = build._load_module_from_path
    build._load_module_from_path = lambda name, path: SimpleNamespace(launch=None)
    try:
        yield
    finally:
        build._load_module_from_path = real


@contextmanager
def _linkable() -> Iterator[None]:
    """Within this context, modules can be linked to libcuda.so.1: to an empty one if the machine has none."""
    known = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    if "libcuda.so.1" in known or knobs.nvidia.libcuda_path:
        yield
        return
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise ConfigError("no C compiler was found, which this version of Triton needs to compile kernels: install gcc")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        subprocess.run([compiler, "-shared", "-x", "c", "/dev/null", "-o", str(library)], check=True)
        knobs.nvidia.libcuda_path = folder
        try:
            yield
        finally:
            knobs.nvidia.libcuda_path = None  # this removes the environment variable too, which the assignment above has set
