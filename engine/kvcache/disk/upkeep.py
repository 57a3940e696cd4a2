"""Upkeep: what the disk tier does besides reads and writes: scan, erase, look for its files, try a disk that failed.

The work runs in the threads of Workers, while no read or write waits. Its results are taken over by `take_news`, in the thread
that owns the index.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from engine.kvcache.disk.counts import Counts
from engine.kvcache.disk.health import Health
from engine.kvcache.disk.index import SlotIndex
from engine.kvcache.disk.outcome import Outcome, of_error
from engine.kvcache.disk.record_files import RecordFiles
from engine.kvcache.disk.scan import Batch, Scan, ScanEnded, Stamps
from engine.kvcache.disk.settings import DiskSettings
from engine.kvcache.disk.workers import Workers

_log = logging.getLogger("tidegate.disk")


@dataclass(frozen=True, slots=True)
class _Erased:
    slot: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class _Inspected:
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class _Probed:
    outcome: Outcome
    is_new: bool  # the files were closed, and the folder was claimed again
    seconds: float


_News = Batch | ScanEnded | _Erased | _Inspected | _Probed


class Upkeep:
    def __init__(
        self,
        settings: DiskSettings,
        files: RecordFiles,
        index: SlotIndex,
        health: Health,
        workers: Workers,
        counts: Counts,
        stamps: Stamps,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._files = files
        self._index = index
        self._health = health
        self._workers = workers
        self._counts = counts
        self._stamps = stamps
        self._clock = clock
        self._news: deque[_News] = deque()
        self._is_looking = False  # an inspection or a probe is queued or runs
        self._inspect_at = clock() + settings.inspect
        self._scan: Scan | None = None
        self._next_segment = 0  # where the next scan begins
        self._scan_at: float | None = clock()  # when to begin or continue the scan; None while it runs, and after its end

    @property
    def is_scanned(self) -> bool:
        """Return whether all segments are allocated and all records of earlier runs found."""
        return self._scan is None and self._scan_at is None

    def take_news(self) -> None:
        """Take over what the background did since the last call."""
        while self._news:
            news = self._news.popleft()
            match news:
                case Batch():
                    self._take_batch(news)
                case ScanEnded():
                    self._end_scan(news.outcome)
                case _Erased():
                    self._take_erased(news)
                case _Inspected():
                    self._is_looking = False
                    self._health.note(news.outcome)
                case _Probed():
                    self._take_probed(news)

    def look_after(self) -> None:
        """Queue the upkeep that is due."""
        now = self._clock()
        if not self._health.is_on:
            if self._health.is_due and not self._is_looking:
                self._is_looking = True
                self._workers.run_alone(self._probe)
            return
        if self._scan_at is not None and now >= self._scan_at:
            self._scan_at = None
            self._scan = Scan(self._files, self._stamps, self._news.append, self._next_segment)
            self._workers.keep_up(self._scan.step)
        if now >= self._inspect_at and not self._is_looking:
            self._is_looking = True
            self._inspect_at = now + self._settings.inspect
            self._workers.keep_up(self._inspect)
        slots = self._index.take_condemned()
        if slots:
            generation = self._files.generation
            self._workers.keep_up(lambda: self._erase(slots, generation))

    def finish_scan(self, is_late: Callable[[], bool]) -> bool:
        """Scan on in the calling thread if a forgotten record may be found, when the threads of Workers have ended.

        No file is allocated. Returns whether no such record is left to find: False after a fault, while off, or once `is_late()`.
        """
        self.take_news()
        if not self._index.is_seeking:
            return True
        if not self._health.is_on:
            return False
        scan = self._scan or Scan(self._files, self._stamps, self._news.append, self._next_segment)
        scan.allocates = False
        while not is_late() and scan.step():
            pass
        outcome = None
        while self._news:
            match self._news.popleft():
                case Batch() as batch:
                    self._take_batch(batch)
                case ScanEnded() as ended:
                    outcome = ended.outcome
        return outcome is Outcome.OK

    def _take_batch(self, batch: Batch) -> None:
        self._index.add_free(batch.free)
        for slot, digest, family, stamp in batch.found:
            self._index.add_found(slot, digest, family, stamp)
        for slot in batch.unreadable:
            self._index.add_unreadable(slot)
        self._counts.dropped.update(batch.dropped)

    def _end_scan(self, outcome: Outcome) -> None:
        if self._scan is not None:
            self._next_segment = self._scan.next_segment
        self._scan = None
        if outcome is Outcome.OK:
            self._index.end_scan()
            found = {"records": len(self._index), "slots": self._index.num_slots, "dropped": self._counts.dropped.total()}
            where = {"folder": str(self._settings.folder), "direct_io": self._files.is_direct}
            _log.info("the disk tier is ready", extra=where | found)
            return
        self._scan_at = self._clock()
        if outcome is Outcome.DISK_FULL and self._files.num_open:
            self._scan_at += self._settings.max_retry
            sizes = {"slots": self._index.num_slots, "wanted": self._files.sizes.num_slots}
            message = "the disk is full: the disk tier stays smaller than it may be"
            _log.warning(message, extra={"folder": str(self._settings.folder), **sizes})
        else:
            self._health.turn_off(outcome)

    def _take_erased(self, news: _Erased) -> None:
        if news.outcome is Outcome.OK:
            self._index.erased(news.slot)
        elif news.outcome is Outcome.IO_ERROR:  # a bad spot of the disk, which its other users need not suffer for
            self._counts.dropped[Outcome.IO_ERROR] += 1
            self._index.retire(news.slot)
        else:
            self._index.erase_again(news.slot)
            self._health.note(news.outcome)

    def _take_probed(self, news: _Probed) -> None:
        self._is_looking = False
        if news.is_new:
            self._index.reset()
            self._scan, self._scan_at, self._next_segment = None, self._clock(), 0
        if news.outcome is Outcome.OK and self._health.is_slow(news.seconds):
            self._health.turn_off(Outcome.SLOW)
        elif news.outcome is Outcome.OK:
            self._health.turn_on()
            self._inspect_at = self._clock() + self._settings.inspect
        else:
            self._health.turn_off(news.outcome)

    def _erase(self, slots: list[int], generation: int) -> bool:
        """Erase the last of `slots` and remove it from the list. Returns whether there are more.

        A list of an earlier generation names slots of files that are closed. In the present files these slots hold other
        records, so nothing is erased, and no news of such a slot comes after the reset of the index.
        """
        if generation != self._files.generation:
            return False
        slot = slots.pop()
        self._news.append(_Erased(slot, self._files.erase(slot)))
        return bool(slots)

    def _inspect(self) -> bool:
        try:
            outcome = Outcome.OK if self._files.is_same() else Outcome.GONE
        except OSError as error:
            outcome = of_error(error)
        self._news.append(_Inspected(outcome))
        return False

    def _probe(self) -> bool:
        """Try the disk. If the folder is not the one that was claimed, close its files and claim the present one or a new one."""
        outcome, is_new, began = Outcome.OK, False, self._clock()
        try:
            is_new = not self._files.is_same()
            if is_new:
                scan = self._scan  # the owner's thread may set it to None meanwhile
                if scan is not None:
                    scan.stop()
                self._files.close()
                self._files.folder.claim()
            if not self._files.num_open:
                self._files.open_segment()
            began = self._clock()
            self._files.probe()
        except OSError as error:
            outcome = of_error(error)
        self._news.append(_Probed(outcome, is_new, self._clock() - began))
        return False
