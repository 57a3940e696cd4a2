"""What launches share: how one kernel follows another, by programmatic dependent launch (PDL) where the device has it.

With PDL a kernel's programs may start while the last ones of the kernel before still run, which hides most of a launch.
Each such kernel waits (`gdc_wait`) before it reads what an earlier one wrote; what it reads before that must be weights.
The kernel after may start once all programs have said `gdc_launch_dependents` or ended.

Triton compiles a kernel again for an integer argument that is 1, or divisible by 16, and for a pointer that is not aligned to
16 bytes. Arguments that differ from step to step are therefore `do_not_specialize`, and arrays begin on 16 bytes.
"""

from __future__ import annotations

from functools import cache
from typing import NotRequired, TypedDict

import torch

MAX_GROUPS = 1 << 16  # of programs that wait for each other's parts, in one launch
_HOPPER = 9  # compute capability; PDL begins there


class PdlOptions(TypedDict):
    PDL: bool  # the kernel's own constexpr
    launch_pdl: NotRequired[bool]  # Triton's launch option, which its interpreter does not know


def pdl(device: torch.device) -> PdlOptions:
    """Keyword arguments for a launch on `device` of a kernel that has a `PDL: tl.constexpr` and waits."""
    return {"PDL": True, "launch_pdl": True} if _has_pdl(device) else {"PDL": False}


@cache
def _has_pdl(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= _HOPPER


@cache
def arrivals(device: torch.device) -> torch.Tensor:
    """Counters [MAX_GROUPS] int32: how many of a group's programs are done with their parts, so that the last goes on for all.
    Every launch leaves them at 0, and launches follow one another, so all kernels share them.
    """
    return torch.zeros(MAX_GROUPS, dtype=torch.int32, device=device)


def cdiv(numerator: int, denominator: int) -> int:
    """Rounded up. Triton's own, and its power of two, serve kernels too, which makes each call a slow one on the host; a step
    outside graphs makes hundreds.
    """
    return -(-numerator // denominator)


def power_of_two(number: int) -> int:
    """The smallest that is not below `number`, which is at least 1."""
    return 1 << (number - 1).bit_length()
