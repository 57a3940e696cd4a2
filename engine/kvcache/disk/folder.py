"""Folder: the directory of a disk tier, with its lock and its key.

lock             locked with flock while a process uses the folder; holds that process's id
key              32 random bytes, mode 0600
segment-NNNNN    the records (segments.py)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from pathlib import Path

from engine.errors import ConfigError
from engine.kvcache.disk.records import KEY_BYTES

_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW


class Folder:
    """Owns the lock of one directory. Methods raise OSError, with EWOULDBLOCK if another process has the lock."""

    def __init__(self, path: Path, key: bytes | None = None) -> None:
        """`key` takes precedence over the one in the folder, and is not written to it."""
        self.path = path
        self._key = key
        self._is_given = key is not None
        self._lock: int | None = None
        self._device: int | None = None  # of the file system where the directory was claimed first

    @property
    def key(self) -> bytes:
        """Return the given key, or the one in the folder, or a random one if there is none or the folder could not be read."""
        if self._key is None:
            self._key = secrets.token_bytes(KEY_BYTES)
        return self._key

    def claim(self) -> None:
        """Make the directory if it is missing, lock it, and read or write its key.

        The key stays the same from the first use of `key` on, since digests were made with it: a later `claim` writes it into
        the directory if that has none, as one that was made again. Another key in the directory is never replaced, and raises
        EKEYREJECTED. A later `claim` raises ENOENT or ENXIO if the file system of the first one is not there.
        """
        self.release()
        self._make()
        self._lock = _lock(self.path / "lock")
        try:
            self._settle_key()
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def is_same(self) -> bool:
        """Return whether the lock is still the file of that name. It is not if the directory was deleted or replaced."""
        return self._lock is not None and is_at(self._lock, self.path / "lock")

    def in_use(self) -> ConfigError:
        """Return the error for a start with a folder that another process has locked."""
        holder = ""
        with contextlib.suppress(OSError, ValueError):
            holder = f" (process {int((self.path / 'lock').read_bytes()[:20])})"
        what = f"cache.disk_tier_folder is {self.path}, which is in use by another process{holder}"
        return ConfigError(f"{what}: each engine needs a folder of its own", param="cache.disk_tier_folder")

    def _make(self) -> None:
        """Make the directory if it is missing: after the first time, never in the file system below one that was unmounted.

        A directory on another file system is taken if it holds the key that was made at the first time: it is a copy.
        """
        if self._device is None:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._device = self.path.stat().st_dev
            return
        place = self.path if self.path.exists() else self.path.parent
        is_copy = not self._is_given and self._key is not None and _read_key(self.path / "key") == self._key
        if place.stat().st_dev != self._device and not is_copy:
            raise OSError(errno.ENXIO, "the file system of the folder is not mounted", str(self.path))
        self.path.mkdir(mode=0o700, exist_ok=True)

    def _settle_key(self) -> None:
        if self._is_given:
            return
        file = self.path / "key"
        found = _read_key(file)
        self._key = self._key or found
        if found is None:
            _write_key(file, self.key)
        elif found != self.key:
            raise OSError(errno.EKEYREJECTED, "the folder has another key than the one in use", str(file))


def is_at(fd: int, path: Path) -> bool:
    """Return whether `path` names the open file `fd`. Raises OSError for any fault other than a missing file."""
    try:
        named = os.stat(path, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return os.path.samestat(named, os.fstat(fd))


def _lock(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | _OPEN, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not is_at(fd, path):  # its last holder's folder was deleted between the two calls
            raise OSError(errno.ENOENT, "the lock was removed", str(path))
        os.pwrite(fd, b"%-20d" % os.getpid(), 0)
    except OSError:
        os.close(fd)
        raise
    return fd


def _read_key(path: Path) -> bytes | None:
    """Return the key in the file, or None if there is no file or no whole key in it."""
    try:
        fd = os.open(path, os.O_RDONLY | _OPEN)
    except FileNotFoundError:
        return None
    try:
        key = os.read(fd, KEY_BYTES + 1)
    finally:
        os.close(fd)
    return key if len(key) == KEY_BYTES else None


def _write_key(path: Path, key: bytes) -> None:
    """Write the key so that the file holds the whole key or does not exist, whatever happens meanwhile."""
    part = path.with_suffix(".new")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _OPEN, 0o600)
    try:
        if os.write(fd, key) != KEY_BYTES:
            raise OSError(errno.ENOSPC, "the key does not fit", str(part))
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(part, path)
