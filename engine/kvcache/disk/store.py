"""DiskStore: the disk tier as its owner sees it. It joins the index, the threads and the files, and turns off and on by itself.

    find, index.pin ------- submit_read ---+
                                           +--- poll ---> Ended: the record is in the buffer, or can be found, or why not
    reserve --------------- submit_write --+

One thread, the engine's loop, calls all methods. None waits for the disk, except `poll` for at most the given time, and `close`.
No fault of the disk raises: operations then end with an Outcome other than OK, and nothing is found until the store is on again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from engine.errors import ConfigError, InternalError
from engine.kvcache.disk.closing import finish
from engine.kvcache.disk.counts import Counts
from engine.kvcache.disk.folder import Folder
from engine.kvcache.disk.health import Health
from engine.kvcache.disk.index import Reserved, SlotIndex
from engine.kvcache.disk.outcome import BAD_RECORD, Outcome, of_error
from engine.kvcache.disk.record_files import RecordFiles, Sizes
from engine.kvcache.disk.records import RecordFormat
from engine.kvcache.disk.scan import Stamps
from engine.kvcache.disk.settings import DiskSettings
from engine.kvcache.disk.upkeep import Upkeep
from engine.kvcache.disk.workers import Ended, Kind, Move, Workers
from engine.kvcache.disk.write_policy import Refusal, TokenBucket


class DiskStore:
    def __init__(
        self, settings: DiskSettings, payload_bytes: int, fingerprint: bytes, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Claim the folder. The first `poll` begins to look for records. See RecordFormat for `fingerprint`.

        Raises ConfigError if another process uses the folder, or if the cap holds no record. With any other fault of the folder
        the store starts turned off, and tries again later.
        """
        self.counts = Counts()
        self.index = SlotIndex()
        self.health = Health(settings, clock)
        stamps = Stamps()
        folder = Folder(settings.folder, settings.key)
        self._claim(folder)
        try:
            record = RecordFormat(payload_bytes, fingerprint, folder.key)
            sizes = Sizes(record.stride, settings.max_bytes, settings.segment_bytes)
        except ConfigError:
            folder.release()
            raise
        self._clock = clock
        self._max_reads, self._max_writes = settings.max_reads, settings.max_writes
        self._num_moving = dict.fromkeys(Kind, 0)
        self._bucket = None
        if settings.write_rate is not None:
            self._bucket = TokenBucket(settings.write_rate, max(settings.write_burst, record.stride), clock)
        self.files = RecordFiles(folder, record, sizes, direct=settings.direct, stamp=stamps.next)
        self._workers = Workers(settings.num_threads, settings.max_reads, settings.max_writes, clock)
        self._upkeep = Upkeep(settings, self.files, self.index, self.health, self._workers, self.counts, stamps, clock)
        self._workers.refuse(not self.health.is_on)

    @property
    def key(self) -> bytes:
        """Return the key of the folder, 32 bytes. Digests are made with it, so that a restart finds them again."""
        return self.files.folder.key

    @property
    def is_scanned(self) -> bool:
        """Return whether all segments are allocated and all records of earlier runs found."""
        return self._upkeep.is_scanned

    @property
    def num_reading(self) -> int:
        """Return how many submitted reads `poll` has not returned."""
        return self._num_moving[Kind.READ]

    @property
    def takes_reads(self) -> bool:
        """Return whether the queue of reads has room for one more."""
        return self.num_reading < self._max_reads

    @property
    def num_writing(self) -> int:
        """Return how many submitted writes `poll` has not returned."""
        return self._num_moving[Kind.WRITE]

    def find(self, digest: bytes) -> int | None:
        """Return the slot of the record of `digest`, or None. To read it, call `index.pin(slot)` before any other method."""
        return self.index.find(digest) if self.health.is_on else None

    def reserve(self, digest: bytes, family: bytes) -> Reserved | Refusal:
        """Take a slot for the record of `digest`, and evict the least recently used record if no slot is free.

        `family` is the digest of the first block of the prefix, 16 bytes as `digest`.
        """
        reserved = self._reserve(digest, family)
        if isinstance(reserved, Refusal):
            self.counts.refused[reserved] += 1
        elif reserved.evicted is not None:
            self.counts.evicted += 1
        return reserved

    def forget_family(self, family: bytes) -> None:
        """See to it that no present record of `family` is ever read again, after a restart neither.

        Slots are erased in the background. Reads and writes of such records that have not ended, or are submitted later for a
        slot that is pinned or reserved now, do not end with OK.
        """
        self.index.forget_family(family)

    def forget_all(self) -> None:
        """Do for all records what `forget_family` does for those of one family.

        Records of another format, which this store never reads, stay in the folder until their slots are used.
        """
        self.index.forget_all()

    def submit_read(self, slot: int, digest: bytes, into: memoryview) -> bool:
        """Read the record of a pinned slot into `into`, which belongs to the store until the read has ended.

        `poll` returns the end and unpins the slot. Returns False if the queue is full: the slot is then unpinned at once.
        """
        self._check_buffer(into)
        if into.readonly:
            raise InternalError("the buffer of a disk read cannot be written to")
        if self._submit(Move(Kind.READ, slot, digest, partial(self.files.read, slot, digest, into))):
            return True
        self.index.unpin(slot)
        self.counts.full_queues += 1
        return False

    def submit_write(self, slot: int, digest: bytes, family: bytes, payload: memoryview) -> bool:
        """Write the record of a slot that was reserved for `digest` and `family`.

        `payload` must not change until the write has ended. `poll` returns the end; if it is OK, the record can be found. Returns
        False if the queue is full: the reservation is then given up at once.
        """
        self._check_buffer(payload)
        if self._submit(Move(Kind.WRITE, slot, digest, partial(self.files.write, slot, digest, family, payload))):
            return True
        self.index.drop(slot)
        self.counts.refused[Refusal.BUSY] += 1
        return False

    def poll(self, seconds: float = 0.0) -> list[Ended]:
        """Return the moves that ended. If there is none, waits up to `seconds` for one, or for news of the background.

        Also takes over what the background found, judges the disk, and turns the store off or on. Raises InternalError if a
        thread ended by an exception, which the log has.
        """
        was_on = self.health.is_on
        ended = [self._settle(move) for move in self._workers.poll(seconds)]
        if self.health.is_on:
            self.health.note_running(self._workers.longest_read())
        self._upkeep.take_news()
        self._upkeep.look_after()
        if self.health.is_on is not was_on:
            self._workers.refuse(not self.health.is_on)
        return ended

    def check(self) -> None:
        """Raise InternalError if the index contradicts itself, or has more slots than the cap allows."""
        self.index.check()
        if self.index.num_slots > self.files.sizes.num_slots:
            raise InternalError(f"the disk index has {self.index.num_slots} slots; the cap allows {self.files.sizes.num_slots}")

    def close(self, seconds: float = 5.0) -> bool:
        """Finish the queued moves, find and erase what was forgotten, and release the folder, within `seconds`.

        Returns False if there was too little time, or a fault: a record that was forgotten may then be found after a restart. If
        a call into the disk has not returned by then, the folder stays locked until the process ends.
        """
        until = self._clock() + seconds
        if not self._workers.close(seconds):
            return False
        for move in self._workers.poll():
            self._settle(move)
        is_erased = finish(self._upkeep, self.index, self.files, max(0.0, until - self._clock()), self._clock)
        if is_erased is None:
            return False
        self.files.close()
        self.files.folder.release()
        return is_erased

    def _claim(self, folder: Folder) -> None:
        try:
            folder.claim()
        except FileExistsError:
            raise ConfigError(
                f"cache.disk_tier_folder is {folder.path}, which is a file: name a directory, or a new one",
                param="cache.disk_tier_folder",
            ) from None
        except OSError as error:
            outcome = of_error(error)
            if outcome is Outcome.IN_USE:
                raise folder.in_use() from None
            self.health.turn_off(outcome)

    def _reserve(self, digest: bytes, family: bytes) -> Reserved | Refusal:
        if not self.health.is_on:
            return Refusal.OFF
        if self.index.has(digest):
            return Refusal.PRESENT
        if self.index.num_reserved >= self._max_writes:
            return Refusal.BUSY
        stride = self.files.sizes.stride
        if self._bucket is not None and not self._bucket.has(stride):
            return Refusal.RATE
        reserved = self.index.reserve(digest, family)
        if reserved is None:
            return Refusal.NO_SLOT
        if self._bucket is not None:
            self._bucket.take(stride)
        return reserved

    def _check_buffer(self, buffer: memoryview) -> None:
        if buffer.nbytes != self.files.record.payload_bytes or buffer.itemsize != 1 or not buffer.c_contiguous:
            raise InternalError(f"a disk record is {self.files.record.payload_bytes} contiguous bytes, not {buffer.nbytes}")

    def _submit(self, move: Move) -> bool:
        is_taken = self._workers.submit(move)
        self._num_moving[move.kind] += is_taken
        return is_taken

    def _settle(self, move: Ended) -> Ended:
        """Take over the end of a move: into the index, the counts and the judgement of the disk. Returns it for the owner."""
        self._num_moving[move.kind] -= 1
        if move.outcome is Outcome.OK and self.index.is_forgotten(move.slot):
            move = replace(move, outcome=Outcome.FORGOTTEN)
        self.counts.add(move, self.files.record.payload_bytes)
        is_lost = move.outcome in BAD_RECORD or move.outcome is Outcome.IO_ERROR
        if move.kind is Kind.WRITE:
            (self.index.commit if move.outcome is Outcome.OK else self.index.drop)(move.slot)
        else:
            if is_lost:
                self.counts.dropped[move.outcome] += 1
                self.index.drop(move.slot)
            self.index.unpin(move.slot)
        self.health.note(move.outcome, move.seconds if move.kind is Kind.READ else None)
        return move
