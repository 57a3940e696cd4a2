"""HostRecords: the memory of the host tier, one record of all pools for each slot. On CUDA it is page-locked.

`tiers.py` decides what lies in which slot, and `engine/device/moves.py` copies.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.errors import ConfigError


class HostRecords:
    """Holds `num_slots` records of `num_words` words each. `records` is a tensor [num_slots, num_words].

    Raises ConfigError, naming cache.host_tier_bytes, if the system does not give so much memory.
    """

    def __init__(self, num_slots: int, num_words: int, dtype: torch.dtype, *, on_cuda: bool) -> None:
        size = num_slots * num_words * dtype.itemsize
        try:
            self.records = torch.empty(num_slots, num_words, dtype=dtype)
        except RuntimeError as error:
            raise _too_large(size) from error
        # torch's own page-locked memory would be rounded up to a power of two, and so exceed the cap.
        self._is_locked = on_cuda
        if on_cuda and int(_cudart().cudaHostRegister(self.records.data_ptr(), size, 0)) != 0:
            raise _too_large(size)

    def close(self) -> None:
        """Unlock the memory. No copy may be under way. The records must not be used any more."""
        if self._is_locked:
            _cudart().cudaHostUnregister(self.records.data_ptr())
            self._is_locked = False


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _too_large(size: int) -> ConfigError:
    return ConfigError(
        f"cache.host_tier_bytes is too large: the system does not give {size / (1 << 30):.2f} GiB of page-locked host memory. "
        "Set a smaller host_tier_bytes",
        param="cache.host_tier_bytes",
    )
