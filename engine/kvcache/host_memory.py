"""HostMemory: the memory of the host tier, one record of all pools of a block for each slot.

`host_tier.py` decides what lies in which slot. Runners copy between it and the device, and the disk tier reads and writes it.
"""

from __future__ import annotations

import mmap

from engine.errors import ConfigError


class HostMemory:
    """Holds `num_slots` records of `record_bytes` each. A record begins at a multiple of `stride` bytes, and the first one at a
    page. Memory is taken from the system as it is written to.

    Raises ConfigError, naming cache.host_tier_bytes, if the system does not give so much.
    """

    def __init__(self, num_slots: int, record_bytes: int, stride: int | None = None) -> None:
        self.num_slots = num_slots
        self.record_bytes = record_bytes
        self.stride = stride or record_bytes
        try:
            pages = mmap.mmap(-1, num_slots * self.stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise too_large(num_slots * self.stride, "host memory") from error
        self.bytes = memoryview(pages)

    def record(self, slot: int) -> memoryview:
        """Return the bytes of a slot's record."""
        begin = slot * self.stride
        return self.bytes[begin : begin + self.record_bytes]


def too_large(size: int, what: str) -> ConfigError:
    return ConfigError(
        f"cache.host_tier_bytes is too large: the system does not give {size / (1 << 30):.2f} GiB of {what}. "
        "Set a smaller host_tier_bytes",
        param="cache.host_tier_bytes",
    )
