"""Mounts a real ext4 file system on a loop device, with faults that a test turns on.

Blocks beyond the end of the image file cannot be read: the loop device answers EIO. ext4 turns itself read-only at an error.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

MKFS = ["mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", "-N", "64"]


class LoopDisk:
    def __init__(self, folder: Path, image: Path) -> None:
        self.folder = folder
        self._image = image
        self._size = image.stat().st_size
        source = subprocess.run(["findmnt", "-n", "-o", "SOURCE", str(folder)], capture_output=True, text=True, check=True)
        self._device = source.stdout.strip()

    def fail_reads(self) -> None:
        """Let every read of the device's second half fail with EIO. Writes bring back the blocks that they write."""
        os.truncate(self._image, self._size // 2)

    def heal(self) -> None:
        """Make all blocks readable. Those that failed are zeros now."""
        os.truncate(self._image, self._size)

    def turn_read_only(self) -> None:
        """Report an error to ext4, which then answers EROFS to every write. What was written before is on the disk."""
        subprocess.run(["sync", "--file-system", str(self.folder)], check=True)
        Path("/sys/fs/ext4", Path(self._device).name, "trigger_fs_error").write_text("a test")

    def replace(self) -> None:
        """Mount a repaired copy of the disk in its place. Files that are open stay those of the disk that failed."""
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)
        copy = self._image.with_suffix(".copy")
        shutil.copyfile(self._image, copy)
        subprocess.run(["e2fsck", "-p", str(copy)], capture_output=True, check=False)
        subprocess.run(["mount", "-o", "loop", str(copy), str(self.folder)], check=True)

    def slow_reads(self, bytes_per_second: int | None) -> None:
        """Limit reads that bypass the page cache; None removes the limit. Skips the test if the kernel has no such limit."""
        control = Path("/sys/fs/cgroup/blkio/blkio.throttle.read_bps_device")
        if not control.exists():
            pytest.skip("limiting the reads of a device takes the blkio controller of cgroup v1")
        number = os.stat(self._device).st_rdev
        control.write_text(f"{os.major(number)}:{os.minor(number)} {bytes_per_second or 0}")


@contextlib.contextmanager
def loop_disk(folder: Path, size: int = 32 << 20) -> Iterator[LoopDisk]:
    """Mount an ext4 of `size` bytes at `folder`, with its image beside it. Skips the test if this process may not."""
    folder.mkdir()
    image = folder.with_suffix(".img")
    image.touch()
    os.truncate(image, size)
    mount = ["mount", "-o", "loop,errors=remount-ro", str(image), str(folder)]
    if os.geteuid() != 0 or not all(map(shutil.which, ("mkfs.ext4", "mount", "findmnt"))):
        pytest.skip("mounting an ext4 takes root and its tools")
    if any(subprocess.run(command, capture_output=True, check=False).returncode != 0 for command in ([*MKFS, str(image)], mount)):
        pytest.skip("mounting an ext4 takes loop devices and the right to mount")
    try:
        yield LoopDisk(folder, image)
    finally:
        os.truncate(image, size)
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
