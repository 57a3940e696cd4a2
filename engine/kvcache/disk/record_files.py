"""RecordFiles: the I/O half of the disk tier. It reads and writes records by slot number and verifies what it reads.

Slots are numbered through all segment files. Any thread may call `write`, `read`, `erase` and `header`. The caller sees to it
that no two calls use one slot at a time, unless both read. One thread at a time opens segments. `close` runs while no other
call does.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from mmap import mmap
from pathlib import Path

import numpy as np

from engine.errors import ConfigError
from engine.kvcache.disk.folder import Folder
from engine.kvcache.disk.outcome import Outcome, of_error
from engine.kvcache.disk.records import PAGE, Header, RecordFormat
from engine.kvcache.disk.segments import SegmentFile

MAX_SEGMENTS = 128  # each has two descriptors


class Sizes:
    """Divides a byte cap into segment files of slots. All files together have at most `max_bytes` bytes.

    A file has about `segment_bytes`, or twice, four times as many and so on, if there would be more than MAX_SEGMENTS files.
    """

    def __init__(self, stride: int, max_bytes: int, segment_bytes: int) -> None:
        """Raises ConfigError if not even one record fits."""
        if max_bytes < PAGE + stride:
            raise ConfigError(
                f"cache.disk_tier_bytes is {max_bytes}, and a file of one record takes {PAGE + stride}: raise it",
                param="cache.disk_tier_bytes",
            )
        self.stride = stride
        self._divide(max_bytes, segment_bytes)
        while self.num_segments > MAX_SEGMENTS:
            segment_bytes *= 2
            self._divide(max_bytes, segment_bytes)

    def _divide(self, max_bytes: int, segment_bytes: int) -> None:
        self.per_segment = max(1, (min(segment_bytes, max_bytes) - PAGE) // self.stride)
        full, rest = divmod(max_bytes, PAGE + self.per_segment * self.stride)
        self.num_slots = full * self.per_segment + max(0, rest - PAGE) // self.stride
        self.num_segments = -(-self.num_slots // self.per_segment)

    def slots(self, segment: int) -> range:
        first = segment * self.per_segment
        return range(first, min(first + self.per_segment, self.num_slots))

    def file_bytes(self, segment: int) -> int:
        return PAGE + len(self.slots(segment)) * self.stride

    def where(self, slot: int) -> tuple[int, int]:
        """Return (segment, offset in bytes) of a slot."""
        segment, index = divmod(slot, self.per_segment)
        return segment, PAGE + index * self.stride


class _Scratch(threading.local):
    """Two pages for each thread, at an aligned address: a record's header, and the last page of its payload."""

    def __init__(self) -> None:
        pages = memoryview(mmap(-1, 2 * PAGE))
        self.header, self.tail = pages[:PAGE], pages[PAGE:]


class RecordFiles:
    def __init__(self, folder: Folder, record: RecordFormat, sizes: Sizes, *, direct: bool, stamp: Callable[[], int]) -> None:
        """`stamp` returns the number of the next write, and is called from several threads."""
        self.folder = folder
        self.record = record
        self.sizes = sizes
        self._direct = direct
        self._stamp = stamp
        self._segments: list[SegmentFile] = []
        self.generation = 0  # how often the files were closed: a slot number is good for the files of one generation
        self._scratch = _Scratch()

    @property
    def num_open(self) -> int:
        """Return how many segment files are open: always the first ones."""
        return len(self._segments)

    @property
    def is_direct(self) -> bool:
        return any(segment.direct_fd is not None for segment in self._segments)

    def is_open(self, slot: int) -> bool:
        return slot // self.sizes.per_segment < len(self._segments)

    def open_segment(self) -> None:
        """Open the next segment file. Raises OSError, and then the file is not open."""
        number = len(self._segments)
        self._segments.append(SegmentFile(self._path(number), self.sizes.file_bytes(number), direct=self._direct))

    def has_unopened(self) -> bool:
        """Return whether there is a segment file that is not open. Raises OSError."""
        missing = range(len(self._segments), self.sizes.num_segments)
        return any(self._path(number).exists() for number in missing)

    def was_empty(self, segment: int) -> bool:
        """Return whether an open segment file was empty or missing when it was opened."""
        return self._segments[segment].was_empty

    def remove_surplus(self) -> None:
        """Delete segment files beyond the cap, which an earlier start with a larger cap left. Raises OSError."""
        for path in self.folder.path.glob("segment-*"):
            number = path.name.removeprefix("segment-")
            if number.isdecimal() and int(number) >= self.sizes.num_segments:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        for segment in self._segments:
            segment.close()
        self._segments.clear()
        self.generation += 1

    def write(self, slot: int, digest: bytes, family: bytes, payload: memoryview) -> Outcome:
        """Write the record of `digest`, a block of `family`. `payload` must not change meanwhile.

        After a fault, the slot may hold anything.
        """
        if not self.is_open(slot):
            return Outcome.OFF
        segment, offset = self._place(slot)
        scratch = self._scratch
        header = self.record.encode(digest, family, self._stamp(), payload)
        scratch.header[:] = header.ljust(PAGE, b"\0")  # no bytes of other records in the padding
        whole = len(payload) - len(payload) % PAGE
        scratch.tail[:] = bytes(payload[whole:]).ljust(PAGE, b"\0")
        try:
            segment.write(self._pages(payload[:whole]), offset, aligned=_is_aligned(payload))
        except OSError as error:
            return of_error(error)
        return Outcome.OK

    def read(self, slot: int, digest: bytes, into: memoryview) -> Outcome:
        """Read the record of `digest` into `into`. Unless the result is OK, the content of `into` is undefined afterwards."""
        if not self.is_open(slot):
            return Outcome.OFF
        segment, offset = self._place(slot)
        scratch = self._scratch
        whole = len(into) - len(into) % PAGE
        try:
            if not segment.read(self._pages(into[:whole]), offset, aligned=_is_aligned(into)):
                return Outcome.CORRUPT
        except OSError as error:
            return of_error(error)
        into[whole:] = scratch.tail[: len(into) - whole]
        return self.record.verify(scratch.header, digest, into)

    def erase(self, slot: int) -> Outcome:
        """Make sure that the slot holds no record, on the disk itself too."""
        if not self.is_open(slot):
            return Outcome.OFF
        segment, offset = self._place(slot)
        page = self._scratch.header
        page[:] = bytes(PAGE)
        try:
            segment.write([page], offset, aligned=True)
            segment.sync()
        except OSError as error:
            return of_error(error)
        return Outcome.OK

    def erase_all(self, slots: Iterable[int], is_late: Callable[[], bool]) -> bool:
        """Erase `slots` as `erase` does, but sync each file once. Returns whether all are erased; ends early once `is_late()`."""
        page = self._scratch.header
        page[:] = bytes(PAGE)
        written: set[SegmentFile] = set()
        is_erased = True
        for slot in slots:
            if is_late() or not self.is_open(slot):
                return False
            segment, offset = self._place(slot)
            try:
                segment.write([page], offset, aligned=True)
                written.add(segment)
            except OSError:  # a bad spot: the others can be erased all the same
                is_erased = False
        for segment in written:
            if is_late():
                return False
            try:
                segment.sync()
            except OSError:
                is_erased = False
        return is_erased

    def header(self, slot: int) -> Header | Outcome:
        """Return the header of the slot's record, or a BAD_RECORD. Its payload is not read. Raises OSError."""
        segment, offset = self._place(slot)
        page = self._scratch.header
        if not segment.read([page], offset, aligned=True):
            return Outcome.CORRUPT
        return self.record.decode(page)

    def is_same(self) -> bool:
        """Return whether the folder and all open files still have their names. Raises OSError."""
        return self.folder.is_same() and all(segment.is_same() for segment in self._segments)

    def probe(self) -> None:
        """Write and read the page of the first segment that holds no record. Raises OSError."""
        segment, page = self._segments[0], self._scratch.header
        page[:] = os.urandom(PAGE)
        written = bytes(page)
        segment.write([page], 0, aligned=True)
        segment.sync()
        if not segment.read([page], 0, aligned=True) or page != written:
            raise OSError(None, "a page was read back wrong", str(segment.path))

    def _path(self, number: int) -> Path:
        return self.folder.path / f"segment-{number:05}"

    def _place(self, slot: int) -> tuple[SegmentFile, int]:
        number, offset = self.sizes.where(slot)
        return self._segments[number], offset

    def _pages(self, whole: memoryview) -> list[memoryview]:
        pages = [self._scratch.header]
        if len(whole):
            pages.append(whole)
        if len(whole) < self.record.padded_bytes:
            pages.append(self._scratch.tail)
        return pages


def _is_aligned(buffer: memoryview) -> bool:
    """Return whether the buffer's address is a multiple of PAGE."""
    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address % PAGE == 0
