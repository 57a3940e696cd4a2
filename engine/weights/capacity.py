"""Checks that a model's weights fit into memory, before they are allocated.

A config.json may name any size, and on a host the kernel kills a process that runs out of memory without a message. The free
memory is estimated generously, since refusing a model that would fit is worse than failing late.
"""

from __future__ import annotations

from pathlib import Path

import torch

from engine.errors import CheckpointError
from engine.models import registry
from engine.models.spec import ModelSpec

MEMINFO = Path("/proc/meminfo")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # holds a number of bytes, or "max"


def check(spec: ModelSpec, *, dtype: torch.dtype, device: torch.device) -> None:
    """Raise CheckpointError, naming both sizes, if the weights of `spec` need more memory than `device` has free."""
    need, have = weight_bytes(spec, dtype), free_bytes(device)
    if have is not None and need > have:
        raise CheckpointError(
            f"the model's weights need {_gib(need)} as {str(dtype).removeprefix('torch.')}, and {device.type} has "
            f"{_gib(have)} free",
            param="model",
        )


def weight_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Count the bytes of all parameters, each once. The model is built on the meta device, so nothing is allocated."""
    model = registry.build(spec, dtype=dtype, device=torch.device("meta"))
    return sum(p.numel() * p.element_size() for p in model.parameters())


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that could be allocated on `device` now; None if the system does not report the number."""
    if device.type == "cuda":
        held_back = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # free bytes in torch's cache
        return int(torch.cuda.mem_get_info(device)[0]) + held_back
    return host_bytes(_read(MEMINFO), _read(CGROUP_LIMIT))


def host_bytes(meminfo: str, cgroup_limit: str) -> int | None:
    """Compute the host's free bytes from the texts of /proc/meminfo and of the cgroup's memory.max ("" for a missing file).

    The container's whole limit counts as free. How much of its used memory is page cache, which can be dropped, is not known.
    """
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in meminfo.splitlines())}
    if "MemAvailable" not in kib:
        return None
    free = (kib["MemAvailable"] + kib.get("SwapFree", 0)) * 1024
    return min(free, int(cgroup_limit)) if cgroup_limit.strip().isdigit() else free


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
