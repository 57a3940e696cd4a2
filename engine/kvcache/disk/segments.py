"""SegmentFile: one preallocated file of slots. It moves bytes and does not know what they mean.

    | probe: one page | slot 0 | slot 1 | ...

The probe page holds no data. The store writes and reads it to learn whether the disk works again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from mmap import mmap
from pathlib import Path

from engine.kvcache.disk.folder import is_at
from engine.kvcache.disk.records import PAGE

_OPEN = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


class SegmentFile:
    """Holds the descriptors of one file. All methods raise OSError, and are safe in several threads."""

    def __init__(self, path: Path, size: int, *, direct: bool) -> None:
        """Open or create the file, and allocate `size` bytes on disk for it. What an existing file holds is kept.

        With `direct`, transfers bypass the page cache if the file system has direct I/O. If the disk has too little space for
        a new file, none is left behind.
        """
        self.path = path
        self.fd = os.open(path, _OPEN | os.O_CREAT, 0o600)
        self.direct_fd: int | None = None
        try:
            self.was_empty = self._allocate(size)
            if direct:
                self.direct_fd = _open_direct(path)
        except OSError:
            self.close()
            raise

    def _allocate(self, size: int) -> bool:
        """Make the file `size` bytes long. Returns whether it was empty."""
        found = os.fstat(self.fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(self.path))
        if found.st_size > size:
            os.ftruncate(self.fd, size)
        if found.st_size < size or found.st_blocks * 512 < size:
            try:
                os.posix_fallocate(self.fd, 0, size)
            except OSError:
                with contextlib.suppress(OSError):  # the error that matters is the first
                    os.ftruncate(self.fd, found.st_size)
                    if found.st_size == 0:
                        os.unlink(self.path)
                raise
        return found.st_size == 0

    def is_same(self) -> bool:
        """Return whether the file still has its name. It has not if it was deleted or replaced."""
        return is_at(self.fd, self.path)

    def write(self, pages: Sequence[memoryview], offset: int, *, aligned: bool) -> None:
        """Write `pages`, whose lengths are multiples of PAGE, at `offset`. `aligned`: so are their addresses."""
        fd = self.fd if self.direct_fd is None or not aligned else self.direct_fd
        while pages:
            done = os.pwritev(fd, pages, offset)
            if done == 0:
                raise OSError(errno.ENOSPC, "nothing was written", str(self.path))
            pages, offset = _rest(pages, done), offset + done

    def read(self, pages: Sequence[memoryview], offset: int, *, aligned: bool) -> bool:
        """Fill `pages` from `offset`. Returns False if the file ends before. See `write` for `aligned`."""
        fd = self.fd if self.direct_fd is None or not aligned else self.direct_fd
        while pages:
            done = os.preadv(fd, pages, offset)
            if done == 0:
                return False
            pages, offset = _rest(pages, done), offset + done
        return True

    def sync(self) -> None:
        os.fdatasync(self.fd)

    def close(self) -> None:
        for fd in (self.fd, self.direct_fd):
            if fd is not None:
                os.close(fd)


def _rest(pages: Sequence[memoryview], done: int) -> Sequence[memoryview]:
    """Return `pages` without their first `done` bytes."""
    for number, page in enumerate(pages):
        if done < len(page):
            return [page[done:], *pages[number + 1 :]]
        done -= len(page)
    return ()


def _open_direct(path: Path) -> int | None:
    """Return a descriptor for direct I/O, or None if the file system refuses it at the opening or at the first read."""
    try:
        fd = os.open(path, _OPEN | os.O_DIRECT)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise
    try:
        os.preadv(fd, [mmap(-1, PAGE)], 0)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise
    return fd
