"""NumberFile: numbers by key in a file, in the format of prometheus_client's multiprocess mode, which its collector reads.

The library writes such files through a memory mapping. On a full disk, or when another process truncates the file, a store into
the mapping ends the process with SIGBUS. `pwrite` raises OSError instead. It costs a few microseconds, so changes are collected
in memory and written together.
"""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict

RESERVED_BYTES = 64 << 10  # size of a new file; the metrics of a worker need less than half
_USED = struct.Struct("i")  # first field of the file: the number of bytes in use
_FIRST_ENTRY = 8
_VALUE = struct.Struct("dd")  # last field of an entry: value and timestamp


class NumberFile:
    """Keeps numbers by key in a file. `set` changes a number in memory, and `publish` writes the changes to the file.

    The space of a new file is reserved at once. The constructor, `position` and `publish` raise OSError if writing fails.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._positions: dict[str, int] = {}
        self._changed = False
        if path.exists():  # the file of a dead process that had the same process id
            for key, _, _, position in MmapedDict.read_all_values_from_file(str(path)):  # type: ignore[no-untyped-call]
                self._positions[key] = position
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        else:
            self._fd = _new_file(path)
        used = max(self._positions.values(), default=_FIRST_ENTRY - _VALUE.size) + _VALUE.size
        self._image = bytearray(os.pread(self._fd, used, 0))  # the file's content as far as it is in use

    def position(self, key: str) -> int:
        """Return the byte position of the number of `key`. A new key is added to the file with the number 0."""
        if key not in self._positions:
            self._append(key)
        return self._positions[key]

    def get(self, position: int) -> float:
        value: float = _VALUE.unpack_from(self._image, position)[0]
        return value

    def set(self, position: int, value: float) -> None:
        _VALUE.pack_into(self._image, position, value, 0.0)
        self._changed = True

    def publish(self) -> None:
        if os.fstat(self._fd).st_nlink == 0 and self._path.parent.exists():
            self._make_again()
        if self._changed:
            self._changed = False
            _write(self._fd, memoryview(self._image)[_FIRST_ENTRY:], _FIRST_ENTRY)

    def close(self) -> None:
        os.close(self._fd)

    def _make_again(self) -> None:
        """Create the file again after it was deleted, and write all numbers to it. The supervisor creates the folder again."""
        fd = _new_file(self._path)
        os.close(self._fd)
        self._fd = fd
        _write(fd, memoryview(self._image)[_FIRST_ENTRY:], _FIRST_ENTRY)
        _write(fd, _USED.pack(len(self._image)), 0)

    def _append(self, key: str) -> None:
        text, used = key.encode(), len(self._image)
        padded = text + b" " * (8 - (len(text) + 4) % 8)
        entry = struct.pack(f"i{len(padded)}sdd", len(text), padded, 0.0, 0.0)
        _write(self._fd, entry, used)
        _write(self._fd, _USED.pack(used + len(entry)), 0)  # now readers find the entry
        self._image += entry
        self._positions[key] = len(self._image) - _VALUE.size


def _new_file(path: Path) -> int:
    """Create the file and return its descriptor. The file gets its final name last, so readers never see an incomplete file."""
    part = path.with_suffix(".part")
    fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        _write(fd, bytes(RESERVED_BYTES), 0)
        _write(fd, _USED.pack(_FIRST_ENTRY), 0)
        part.rename(path)
    except OSError:
        os.close(fd)
        part.unlink(missing_ok=True)
        raise
    return fd


def _write(fd: int, data: bytes | memoryview, position: int) -> None:
    if os.pwrite(fd, data, position) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
