"""Knows the properties of GPUs, present or planned for, that decide which kernels run there.

It also measures the present GPU's memory bandwidth and bfloat16 rate, the bounds of benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch

_COPIED = 256 << 20  # bytes that the bandwidth measurement copies at a time: several times any L2 cache
_COPIES = 40
_SIDE = 8192  # rows and columns of the matrices whose product is measured
_PRODUCTS = 8
_TRIES = 3  # measurements of each rate: the first is also the warm-up, and the best one counts


def present() -> Gpu | None:
    """Return the current CUDA device's properties, or None if torch sees no CUDA device."""
    return properties(torch.device("cuda")) if torch.cuda.is_available() else None


def name() -> str | None:
    """Return the name of the current CUDA device, or None if torch sees no CUDA device."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


class Gpu(NamedTuple):
    """The properties of a GPU that decide which kernels a step launches, and how they are compiled."""

    name: str
    capability: tuple[int, int]  # CUDA's compute capability
    processors: int  # multiprocessors
    shared_memory: int  # bytes of shared memory that one program may use


# GPUs by the names that `tidegate compile --gpu` takes, for machines that lack the GPU.
GPUS = {
    "a100": Gpu("NVIDIA A100", (8, 0), 108, 166912),
    "a10": Gpu("NVIDIA A10", (8, 6), 72, 101376),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 101376),
    "l40s": Gpu("NVIDIA L40S", (8, 9), 142, 101376),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 101376),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448),
    "h100-pcie": Gpu("NVIDIA H100 PCIe", (9, 0), 114, 232448),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 232448),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 232448),
}
# Triton's interpreter runs kernels on a CPU in tests. Its number of processors is arbitrary, and its memory has no limit.
_INTERPRETER = Gpu("Triton's interpreter", (0, 0), 8, 1 << 30)
_planned_for: ContextVar[Gpu | None] = ContextVar("planned_for", default=None)


def is_gpu(device: torch.device) -> bool:
    """Whether steps on `device` launch GPU kernels. Those on "meta" do within `planned_for`, where they are planned for a GPU."""
    return device.type == "cuda" or (device.type == "meta" and _planned_for.get() is not None)


@contextmanager
def planned_for(gpu: Gpu) -> Iterator[None]:
    """Within this context, the device "meta" stands for `gpu`: the steps that run there launch the kernels that they would
    launch on `gpu`. Tensors on "meta" have shapes and no memory, so the machine needs no GPU."""
    token = _planned_for.set(gpu)
    try:
        yield
    finally:
        _planned_for.reset(token)


def properties(device: torch.device) -> Gpu:
    """Return the properties of `device`, which is a GPU, the device "meta" within `planned_for`, or a CPU that interprets."""
    if device.type == "cuda":
        return _read(device)
    planned = _planned_for.get()
    return planned if device.type == "meta" and planned is not None else _INTERPRETER


@cache
def _read(device: torch.device) -> Gpu:
    found = torch.cuda.get_device_properties(device)
    # getattr, since torch's type stub lacks this attribute.
    memory = int(getattr(found, "shared_memory_per_block_optin"))  # noqa: B009
    return Gpu(found.name, (found.major, found.minor), found.multi_processor_count, memory)


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU."""
    return properties(device).processors


def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that one program may use."""
    return properties(device).shared_memory


def measure() -> tuple[float, float]:
    """Measure memory bandwidth in bytes a second, and a bfloat16 matrix product in floating-point operations a second.

    The bandwidth is that of a copy, and counts both the bytes read and the bytes written. The measurement takes a fraction of a
    second and, while it runs, about a gigabyte of device memory.
    """
    return _bandwidth(), _rate()


def _bandwidth() -> float:
    source = torch.zeros(_COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * _COPIED * _COPIES / _seconds(lambda: target.copy_(source), _COPIES)


def _rate() -> float:
    a, b = (torch.randn(_SIDE, _SIDE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return 2 * _SIDE**3 * _PRODUCTS / _seconds(lambda: torch.mm(a, b, out=out), _PRODUCTS)


def _seconds(run: Callable[[], object], times: int) -> float:
    best = float("inf")
    for _ in range(_TRIES):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(times):
            run()
        ended.record()
        ended.synchronize()
        best = min(best, began.elapsed_time(ended) / 1000)
    return best
