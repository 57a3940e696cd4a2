"""Helpers for kernel launches: programmatic dependent launch (PDL), arrival counters, and integer helpers.

With PDL, the programs of a kernel may start while the last programs of the preceding kernel still run, which hides most of the
launch latency. A kernel with PDL calls `gdc_wait` before it reads anything that an earlier kernel wrote; before that call it may
read only weights. The following kernel may start once every program has called `gdc_launch_dependents` or has ended.

Triton compiles a kernel again when an integer argument is 1 or divisible by 16, and when a pointer is not aligned to 16 bytes.
Integer arguments that differ from step to step are therefore listed in `do_not_specialize`, and every array that is part of a
larger allocation begins on a multiple of 16 bytes.
"""

from __future__ import annotations

from functools import cache
from typing import NotRequired, TypedDict

import torch

from engine.kernels.hardware import properties

MAX_GROUPS = 1 << 16  # one launch may have this many groups of programs that combine partial results
_HOPPER = 9  # devices have PDL from this major version of the compute capability on


class PdlOptions(TypedDict):
    PDL: bool  # value of the kernel's own constexpr `PDL`
    launch_pdl: NotRequired[bool]  # Triton's launch option; left out without PDL, since Triton's interpreter does not know it


def pdl(device: torch.device) -> PdlOptions:
    """Return the keyword arguments that launch a kernel with PDL if `device` has it.

    The kernel must have a `PDL: tl.constexpr` and call `gdc_wait`.
    """
    return {"PDL": True, "launch_pdl": True} if properties(device).capability[0] >= _HOPPER else {"PDL": False}


@cache
def arrivals(device: torch.device) -> torch.Tensor:
    """Return the device's counters [MAX_GROUPS] int32, one for each group of programs whose partial results are combined.

    A program adds 1 to its group's counter once its part is written. The program that finds all others done combines the parts
    and sets the counter back to 0. All kernels share these counters: launches in one stream follow each other, and each leaves
    the counters at 0.
    """
    return torch.zeros(MAX_GROUPS, dtype=torch.int32, device=device)


def cdiv(numerator: int, denominator: int) -> int:
    """Divide and round up.

    This replaces `triton.cdiv` on the host, and `power_of_two` replaces `triton.next_power_of_2`. Kernels can call Triton's
    functions too, which makes a call on the host take 10 us, and a step outside a CUDA graph makes hundreds of such calls.
    """
    return -(-numerator // denominator)


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`. `number` is at least 1."""
    return 1 << (number - 1).bit_length()
