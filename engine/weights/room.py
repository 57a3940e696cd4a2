"""Whether a model's weights fit, asked before they are allocated: a checkpoint may claim any size, and on a host the system
would kill the process in the midst of loading, without a word.

What is free is taken at its most generous, since a wrong refusal is worse than a late failure.
"""

from __future__ import annotations

from pathlib import Path

import torch

from engine.errors import CheckpointError
from engine.models import registry
from engine.models.spec import ModelSpec

MEMINFO = Path("/proc/meminfo")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # bytes, or "max"


def check(spec: ModelSpec, *, dtype: torch.dtype, device: torch.device) -> None:
    """Raise CheckpointError, naming both figures, where the weights of `spec` need more than `device` has free."""
    need, have = weight_bytes(spec, dtype), free_bytes(device)
    if have is not None and need > have:
        raise CheckpointError(
            f"the model's weights need {_gib(need)} as {str(dtype).removeprefix('torch.')}, and {device.type} has "
            f"{_gib(have)} free",
            param="model",
        )


def weight_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Of all parameters, each counted once. Nothing is allocated: the meta device has only shapes."""
    model = registry.build(spec, dtype=dtype, device=torch.device("meta"))
    return sum(p.numel() * p.element_size() for p in model.parameters())


def free_bytes(device: torch.device) -> int | None:
    """What could be had on `device` now; None where the system does not say."""
    if device.type == "cuda":
        held_back = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for its next tensors
        return int(torch.cuda.mem_get_info(device)[0]) + held_back
    return host_bytes(_read(MEMINFO), _read(CGROUP_LIMIT))


def host_bytes(meminfo: str, cgroup_limit: str) -> int | None:
    """From the texts of the two files, "" for one that is not there. A container's limit counts whole: how much of what it
    uses is a cache that it can drop is not known."""
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in meminfo.splitlines())}
    if "MemAvailable" not in kib:
        return None
    free = (kib["MemAvailable"] + kib.get("SwapFree", 0)) * 1024
    return min(free, int(cgroup_limit)) if cgroup_limit.strip().isdigit() else free


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
