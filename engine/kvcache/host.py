"""HostRecords: the host tier's memory as a tensor of torch. On CUDA it is page-locked. `engine/device/moves.py` copies."""

from __future__ import annotations

from typing import Any

import torch

from engine.errors import InternalError
from engine.kvcache.host_memory import HostMemory, too_large


class HostRecords:
    """`records` is a tensor [num_slots, words of a record] over `memory`.

    Raises ConfigError, naming cache.host_tier_bytes, if the system does not lock so much memory.
    """

    def __init__(self, memory: HostMemory, word: torch.dtype, *, on_cuda: bool) -> None:
        size = memory.num_slots * memory.stride
        words = torch.frombuffer(memory.bytes, dtype=word).view(memory.num_slots, memory.stride // word.itemsize)
        self.records = words[:, : memory.record_bytes // word.itemsize]
        # torch's own page-locked memory would be rounded up to a power of two, and so exceed the cap.
        self._is_locked = on_cuda
        if on_cuda and int(_cudart().cudaHostRegister(self.records.data_ptr(), size, 0)) != 0:
            raise too_large(size, "page-locked host memory")

    def close(self) -> None:
        """Let go of the memory. No copy may be under way. Raises InternalError if the system does not unlock it."""
        if self._is_locked:
            self._is_locked = False
            status = int(_cudart().cudaHostUnregister(self.records.data_ptr()))
            if status != 0:
                raise InternalError(f"the memory of the host tier cannot be unlocked: CUDA error {status}")
        self.records = self.records[:0].clone()


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
