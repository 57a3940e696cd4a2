"""Reads properties of the CUDA device, and measures its memory bandwidth and bfloat16 rate, the bounds of benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

_COPIED = 256 << 20  # bytes that the bandwidth measurement copies at a time: several times any L2 cache
_COPIES = 40
_SIDE = 8192  # rows and columns of the matrices whose product is measured
_PRODUCTS = 8
_TRIES = 3  # measurements of each rate: the first is also the warm-up, and the best one counts


def name() -> str | None:
    """Return the name of the current CUDA device, or None if torch sees no CUDA device."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU. On a CPU, where Triton's interpreter runs kernels, it is arbitrary."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that one program may use. Triton's interpreter has no limit."""
    if device.type != "cuda":
        return 1 << 30
    # getattr, since torch's type stub lacks this attribute.
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin"))  # noqa: B009


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
