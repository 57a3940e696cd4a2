"""Implements `tidegate compile`, which compiles a model's kernels for a GPU into a folder."""

from __future__ import annotations

import importlib
import importlib.util
import time
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from engine.config import resolve
from engine.errors import ConfigError
from engine.models.families import read_spec
from server.bench import lines
from server.bench.lines import CompileLine
from server.settings import Settings

MEGABYTE = 1e6


def run(settings: Settings, output: Path, gpu: str | None) -> CompileLine:
    """Compile the kernels of the model that `settings` name for the GPU called `gpu`, by default this machine's, into `output`.

    The result is a sentence on stderr and a JSON line on stdout. Raises ConfigError for an unknown GPU, for a model whose kernels
    cannot be planned, and for a folder that cannot be written.
    """
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("compiling kernels needs Triton, which is not installed: run .venv/bin/pip install 'triton>=3.6'")
    target = find_gpu(importlib.import_module("engine.kernels.hardware"), gpu)
    began = time.monotonic()
    console = Console(stderr=True)
    config = settings.engine_config()
    spec = read_spec(config.model)
    kernels = importlib.import_module("engine.device.kernel_set")  # by name: not every machine has Triton
    config = resolve(msgspec.structs.replace(config, device="cuda"), spec.limits(), has_cuda=True)
    try:
        found, size = kernels.export(spec, config, target, output)
    except OSError as error:
        raise ConfigError(f"the kernels cannot be written to {output}: {error}") from error
    line = CompileLine(
        date=lines.today(),
        commit=lines.commit(),
        device=target.name,
        model=Path(config.model).resolve().name,
        precision=config.dtype,
        kernels=found.num_kernels,
        bytes=size,
        seconds=round(time.monotonic() - began, 2),
        command=lines.command(),
    )
    console.print(
        f"{line.kernels} kernels of {line.model} for {target.name} in {output}: {size / MEGABYTE:.1f} MB, {line.seconds:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    lines.write(line, None)
    return line


def find_gpu(hardware: Any, name: str | None) -> Any:
    """Return the GPU called `name` of the module `hardware`, or this machine's if `name` is None."""
    known = hardware.GPUS
    if name is None:
        found = hardware.present()
        if found is None:
            raise ConfigError(f"this machine has no GPU: name one with --gpu, one of {', '.join(known)}", param="gpu")
        return found
    if name not in known:
        raise ConfigError(f"gpu is {name!r}: it must be one of {', '.join(known)}", param="gpu")
    return known[name]
