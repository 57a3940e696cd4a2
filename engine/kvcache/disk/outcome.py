"""Outcome: how an operation on the disk ended. The store returns outcomes and lets no OSError through."""

from __future__ import annotations

import errno
from enum import StrEnum


class Outcome(StrEnum):
    """The values are the labels of metrics and the reasons in log lines."""

    OK = "ok"

    # What was found in place of the record.
    EMPTY = "empty"  # no record
    FOREIGN = "foreign"  # a record of another version, format or key
    OTHER = "other"  # a record of another digest
    CORRUPT = "corrupt"  # a record that is torn, cut off or changed

    # What the file system answered.
    DISK_FULL = "disk_full"  # no space, no inode, or a quota that is used up
    READ_ONLY = "read_only"
    GONE = "gone"  # the folder or a file in it was removed or replaced
    DENIED = "denied"
    IO_ERROR = "io_error"  # any other error

    # What the store decided.
    SLOW = "slow"  # reads take longer than the bound
    IN_USE = "in_use"  # another process uses the folder
    OTHER_KEY = "other_key"  # the folder has a key, and not the one that digests were made with
    FORGOTTEN = "forgotten"  # the record was forgotten before the end of the read or write
    OFF = "off"  # the store was turned off before the operation began
    CRASHED = "crashed"  # the thread that ran the operation ended by an exception


BAD_RECORD = frozenset({Outcome.EMPTY, Outcome.FOREIGN, Outcome.OTHER, Outcome.CORRUPT})
DISK_FAULT = frozenset(
    {Outcome.DISK_FULL, Outcome.READ_ONLY, Outcome.GONE, Outcome.DENIED, Outcome.IO_ERROR, Outcome.IN_USE, Outcome.OTHER_KEY}
)

_BY_ERRNO = {
    errno.ENOSPC: Outcome.DISK_FULL,
    errno.EDQUOT: Outcome.DISK_FULL,
    errno.EROFS: Outcome.READ_ONLY,
    errno.ENOENT: Outcome.GONE,
    errno.ENOTDIR: Outcome.GONE,
    errno.ESTALE: Outcome.GONE,
    errno.ENXIO: Outcome.GONE,
    errno.ENODEV: Outcome.GONE,
    errno.EACCES: Outcome.DENIED,
    errno.EPERM: Outcome.DENIED,
    errno.EWOULDBLOCK: Outcome.IN_USE,
    errno.EKEYREJECTED: Outcome.OTHER_KEY,
}


def of_error(error: OSError) -> Outcome:
    """Return the outcome that stands for `error`. An error number that is not listed gives IO_ERROR."""
    return _BY_ERRNO.get(error.errno or 0, Outcome.IO_ERROR)
