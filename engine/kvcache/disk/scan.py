"""Scan: finds the records of earlier runs by their headers, segment by segment, and allocates the segments that are missing.

It runs as upkeep, a few headers at a time, so reads and writes are served meanwhile. Each step tells what it found.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from engine.kvcache.disk.outcome import Outcome, of_error
from engine.kvcache.disk.record_files import RecordFiles
from engine.kvcache.disk.records import Header

HEADERS_A_STEP = 64


@dataclass(slots=True)
class Batch:
    """What one step found: (slot, digest, family, stamp) of each record, slots without one, and slots that cannot be read."""

    found: list[tuple[int, bytes, bytes, int]] = field(default_factory=list)
    free: Sequence[int] = ()
    unreadable: list[int] = field(default_factory=list)
    dropped: Counter[Outcome] = field(default_factory=Counter)  # records that cannot be used, by reason


@dataclass(frozen=True, slots=True)
class ScanEnded:
    """OK if all segments are scanned; otherwise why the next one cannot be opened or read. A new Scan can continue there."""

    outcome: Outcome


class Stamps:
    """Numbers the writes to a folder in their order, over restarts too. Safe in several threads.

    A number is the time in nanoseconds, or one more than the largest number until now if the clock went back.
    """

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._last = 0
        self._lock = threading.Lock()

    def next(self) -> int:
        with self._lock:
            self._last = max(self._last + 1, self._clock())
            return self._last

    def saw(self, stamp: int) -> None:
        """Note the stamp of a record that an earlier run wrote."""
        with self._lock:
            self._last = max(self._last, stamp)


class Scan:
    def __init__(self, files: RecordFiles, stamps: Stamps, tell: Callable[[Batch | ScanEnded], None], first: int = 0) -> None:
        """`first` is the segment to begin with, and `tell` takes what each step found, in the thread that does the step."""
        self._files = files
        self._stamps = stamps
        self._tell = tell
        self.next_segment = first  # the first segment that is not scanned yet
        self.allocates = True  # whether missing files are made; without, the scan ends after the last file that exists
        self._batches = self._run()
        self._is_stopped = False

    def step(self) -> bool:
        """Do one step. Returns whether there are more."""
        if self._is_stopped:
            return False
        try:
            self._tell(next(self._batches))
        except StopIteration:
            self._tell(ScanEnded(Outcome.OK))
            return False
        except OSError as error:
            self._tell(ScanEnded(of_error(error)))
            return False
        return True

    def stop(self) -> None:
        """Make further steps do nothing, because the files are about to be closed. Not to be called during a step."""
        self._is_stopped = True

    def _run(self) -> Iterator[Batch]:
        """Yield the batches of all segments. Raises OSError if one cannot be opened, or its headers cannot be read."""
        files = self._files
        files.remove_surplus()
        for segment in range(self.next_segment, files.sizes.num_segments):
            if segment == files.num_open:
                if not self.allocates and not files.has_unopened():
                    return
                files.open_segment()
            slots = files.sizes.slots(segment)
            if files.was_empty(segment):
                yield Batch(free=slots)
            else:
                remaining = iter(slots)
                while some := list(islice(remaining, HEADERS_A_STEP)):
                    yield self._look(some)
            self.next_segment = segment + 1

    def _look(self, slots: list[int]) -> Batch:
        """Read the headers of `slots`. A bad spot of the disk costs its slot, since the rest of the disk may be good.

        Raises OSError for every other fault, and if none of several headers can be read: then it is the disk, not a spot.
        """
        batch = Batch()
        free = []
        for slot in slots:
            try:
                header = self._files.header(slot)
            except OSError as error:
                batch.unreadable.append(slot)
                batch.dropped[Outcome.IO_ERROR] += 1
                if of_error(error) is not Outcome.IO_ERROR or 1 < len(slots) == len(batch.unreadable):
                    raise
                continue
            if isinstance(header, Header):
                self._stamps.saw(header.stamp)
                batch.found.append((slot, header.digest, header.family, header.stamp))
            else:
                free.append(slot)
                if header is not Outcome.EMPTY:
                    batch.dropped[header] += 1
        batch.free = free
        return batch
