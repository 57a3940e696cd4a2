"""RunFolder: the private folder of one run of the server. It holds the engine's socket and the workers' metric files."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import stat
import tempfile
from pathlib import Path

from engine.errors import ConfigError

log = logging.getLogger("tidegate.supervisor")

PREFIX = "tidegate-run-"
CHECK_SECONDS = 1.0  # time between two checks whether the folder was deleted


class RunFolder:
    """A folder that only this user can enter, locked for as long as this process runs.

    The lock tells a later start that the owner is alive: the kernel releases it when the process ends, however it ends.
    systemd-tmpfiles leaves a locked folder alone, too.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock  # a descriptor of the folder itself
        self._warned = False  # that the folder for metrics cannot be made

    @classmethod
    def make(cls) -> RunFolder:
        """Make and lock a new run folder, and remove the run folders of servers that were killed.

        Raises ConfigError if no folder can be made among the temporary files.
        """
        try:
            remove_abandoned(Path(tempfile.gettempdir()))
            while (folder := cls._try_make()) is None:
                pass
            return folder
        except OSError as error:
            raise ConfigError(f"no folder for temporary files can be used: {error}; set TMPDIR to one that can") from None

    @classmethod
    def _try_make(cls) -> RunFolder | None:
        """Make and lock a new folder; None if another start took it for an abandoned one and removed it. Raises OSError."""
        path = Path(tempfile.mkdtemp(prefix=PREFIX))  # its mode is 0700: the engine's socket has no other protection
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(shutil.rmtree, path, ignore_errors=True)
            try:
                lock = _lock(path)
            except FileNotFoundError:  # removed before it was opened
                return None
            on_failure.callback(os.close, lock)
            folder = cls(path, lock)
            if not folder._is_whole():  # removed after it was opened, and before the lock
                return None
            folder.metrics.mkdir()
            on_failure.pop_all()
            return folder

    @property
    def metrics(self) -> Path:
        return self.path / "metrics"

    def restore(self) -> bool:
        """Make the parts of the folder that are missing. Returns whether any was made again. Raises OSError.

        A folder for metrics that cannot be made stops no process: API workers then keep their metrics in memory.
        """
        deleted = not self._is_whole()
        if deleted:
            self._make_again()
        if self.metrics.is_dir():
            return deleted
        try:
            self.metrics.mkdir()
        except OSError as error:
            if not self._warned:
                log.error("%s cannot be made (%s): API workers keep their metrics in memory", self.metrics, error.strerror)
            self._warned = True
            return deleted
        self._warned = False
        return True

    def remove(self) -> None:
        """Delete the run folder with all its files, and release its lock."""
        if self._is_whole():
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    def _is_whole(self) -> bool:
        """Return whether the folder at `path` is still the folder that this process locked."""
        try:
            there = self.path.lstat()
        except OSError:
            return False
        return os.path.samestat(there, os.fstat(self._lock))

    def _make_again(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        found = self.path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise FileExistsError(f"{self.path} is now something else")
        lock = _lock(self.path)
        os.close(self._lock)
        self._lock = lock


async def keep(folder: RunFolder) -> None:
    """Check `folder` every CHECK_SECONDS, and make it again if somebody has deleted it. Never returns."""
    failed = False
    while True:
        await asyncio.sleep(CHECK_SECONDS)
        try:
            if folder.restore():
                log.error(
                    "the server's private folder was deleted and is made again; metrics of workers that run now are incomplete",
                    extra={"folder": str(folder.path)},
                )
            failed = False
        except OSError as error:
            if not failed:
                log.error("the server's private folder was deleted and cannot be made again: %s", error)
            failed = True


def remove_abandoned(parent: Path) -> None:
    """Remove this user's run folders in `parent` whose owner is dead. A folder whose lock cannot be taken is left alone."""
    for path in parent.glob(PREFIX + "*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_uid == os.geteuid():
                    shutil.rmtree(path, ignore_errors=True)
                    log.info("removed the folder of a server that was killed", extra={"folder": str(path)})
            finally:
                os.close(descriptor)


def _lock(path: Path) -> int:
    """Open and lock a folder. The lock is shared, since some network file systems have no other for folders. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
