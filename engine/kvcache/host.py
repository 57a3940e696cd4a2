"""HostRecords: the memory of the host tier, one record of all pools for each slot. On CUDA it is page-locked.

`tiers.py` decides what lies in which slot, and `engine/device/moves.py` copies.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.errors import ConfigError, InternalError


class HostRecords:
    """Holds `num_slots` records of `num_words` words each. `records` is a tensor [num_slots, num_words].

    Raises ConfigError, naming cache.host_tier_bytes, if the system does not give so much memory.
    """

    def __init__(self, num_slots: int, num_words: int, dtype: torch.dtype, *, on_cuda: bool) -> None:
        size = num_slots * num_words * dtype.itemsize
        try:
            self.records = torch.empty(num_slots, num_words, dtype=dtype)
        except RuntimeError as error:
            raise _too_large(size, "host memory") from error
        # torch's own page-locked memory would be rounded up to a power of two, and so exceed the cap.
        self._is_locked = on_cuda
        if on_cuda and int(_cudart().cudaHostRegister(self.records.data_ptr(), size, 0)) != 0:
            raise _too_large(size, "page-locked host memory")

    def close(self) -> None:
        """Free the memory. No copy may be under way. Raises InternalError if the system does not unlock it."""
        if self._is_locked:
            self._is_locked = False
            status = int(_cudart().cudaHostUnregister(self.records.data_ptr()))
            if status != 0:
                raise InternalError(f"the memory of the host tier cannot be unlocked: CUDA error {status}")
        self.records = self.records[:0].clone()


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _too_large(size: int, what: str) -> ConfigError:
    return ConfigError(
        f"cache.host_tier_bytes is too large: the system does not give {size / (1 << 30):.2f} GiB of {what}. "
        "Set a smaller host_tier_bytes",
        param="cache.host_tier_bytes",
    )
