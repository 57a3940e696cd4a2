"""What this CUDA device is, and can do at most: the two figures, measured, that a bound is made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

_COPIED = 256 << 20  # bytes; several times any L2 cache
_COPIES = 40
_SIDE = 8192  # of the square matrices
_PRODUCTS = 8
_TRIES = 3  # the first also warms up; the best counts


def name() -> str | None:
    """Of the device; None where torch sees none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU. Under Triton's interpreter any number does."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of it that one program may have. Triton's interpreter knows no limit."""
    if device.type != "cuda":
        return 1 << 30
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin"))  # noqa: B009  # torch has it untyped


def measure() -> tuple[float, float]:
    """Bytes a second of a copy, read and written ones counted both, and floating-point operations a second of a bfloat16 matrix
    product. Takes a fraction of a second, and a gigabyte of the device's memory for as long.
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
