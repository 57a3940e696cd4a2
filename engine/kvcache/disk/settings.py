"""DiskSettings: what can be set about the disk tier."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError

_AT_LEAST_ONE = ("segment_bytes", "num_threads", "max_reads", "max_writes")
_SECONDS = ("slow_read", "retry", "inspect")
_PARAMS = {"write_rate": "cache.disk_tier_write_rate"}  # what the operator calls a setting


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSettings:
    folder: Path
    max_bytes: int  # cap of all segment files together
    key: bytes | None = None  # 32 bytes that replicas share; None: the folder's own
    segment_bytes: int = 1 << 30  # size of one file; doubled until there are at most 128
    direct: bool = True  # bypass the page cache where the file system can
    num_threads: int = 4
    max_reads: int = 4096  # largest number of reads that wait
    max_writes: int = 64  # largest number of writes that wait or run
    write_rate: float | None = None  # bytes/s; None: no limit
    write_burst: float = 1 << 30  # bytes that may be written at once after a pause; one record at least

    # In seconds.
    slow_read: float = 1.0  # a read of one record, from its start to its end, queueing not included, that is too slow
    retry: float = 5.0  # from turning off to the first attempt to turn on; doubles with each attempt that fails
    max_retry: float = 300.0  # at least `retry`
    inspect: float = 5.0  # how often the store makes sure that its files still have their names

    def __post_init__(self) -> None:
        """Raises ConfigError if a number is out of its range. `max_bytes` and `key` are checked with the size of a record."""
        for name in _AT_LEAST_ONE:
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in _SECONDS:
            self._require(name, 0.0 < getattr(self, name) < math.inf, "a number of seconds above 0")
        self._require("max_retry", self.retry <= self.max_retry < math.inf, f"a number of seconds, at least retry ({self.retry})")
        rate = self.write_rate
        self._require("write_rate", rate is None or 0.0 < rate < math.inf, "a number of bytes/s above 0, or unset")
        self._require("write_burst", 0.0 <= self.write_burst < math.inf, "a number of bytes, at least 0")

    def _require(self, name: str, is_right: bool, what: str) -> None:
        if not is_right:
            param = _PARAMS.get(name)
            shown = param or f"the setting {name} of the disk tier"
            raise ConfigError(f"{shown} is {getattr(self, name)}: it must be {what}", param=param)
