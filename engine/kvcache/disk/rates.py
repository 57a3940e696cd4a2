"""Measures how fast records are written and read in a folder, through a DiskStore and its threads."""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from engine.kvcache.disk.index import Reserved
from engine.kvcache.disk.outcome import Outcome
from engine.kvcache.disk.records import PAGE, RecordFormat
from engine.kvcache.disk.settings import DiskSettings
from engine.kvcache.disk.store import DiskStore

AHEAD = 2  # moves on their way, for each thread


class DiskRates(NamedTuple):
    is_direct: bool  # whether the page cache was bypassed
    write_gb_s: float  # of payload; a write ends on the disk
    read_gb_s: float  # of payload, verified, with an empty page cache
    seconds: dict[str, float]  # that a record took in its thread on average: "read", "write"


def measure(folder: Path, record_bytes: int, number: int, *, num_threads: int = 4, direct: bool = True) -> DiskRates:
    """Write `number` records of `record_bytes` bytes into new files in `folder`, and read all of them in random order.

    `folder` must hold nothing of a disk tier. The files stay there. Raises OSError if the disk fails or is too slow for the tier.
    """
    store = open_store(folder, record_bytes, number, num_threads=num_threads, direct=direct)
    try:
        buffers = [random_buffer(record_bytes) for _ in range(AHEAD * num_threads)]
        digests = make_digests(number)
        began = time.perf_counter()
        move(store, digests, buffers, is_read=False)
        sync(folder)
        written = time.perf_counter()
        random.Random(1).shuffle(digests)
        move(store, digests, buffers, is_read=True)
        read = time.perf_counter()
        seconds = {str(kind): spent / number for kind, spent in store.counts.seconds.items()}
        is_direct = store.files.is_direct
    finally:
        store.close()
    gigabytes = number * record_bytes / 1e9
    return DiskRates(is_direct, gigabytes / (written - began), gigabytes / (read - written), seconds)


def open_store(folder: Path, record_bytes: int, number: int, *, num_threads: int = 4, direct: bool = True) -> DiskStore:
    """Return a store with room for `number` records that has ended its scan. Raises OSError if it is off."""
    settings = DiskSettings(folder=folder, max_bytes=file_bytes(record_bytes, number), num_threads=num_threads, direct=direct)
    store = DiskStore(settings, record_bytes, b"measurement")
    while not store.is_scanned:
        store.poll(1.0)
        if store.health.reason is not None:
            store.close()
            raise OSError(f"the disk tier turned itself off: {store.health.reason}")
    return store


def file_bytes(record_bytes: int, number: int) -> int:
    """Return how many bytes the files of `number` records have at most."""
    return number * (RecordFormat(record_bytes, b"", bytes(32)).stride + PAGE)


def move(store: DiskStore, digests: Iterable[bytes], buffers: list[memoryview], *, is_read: bool) -> None:
    """Move all records through `buffers`, as many at a time as there are. Raises OSError if one fails."""
    free, held = list(buffers), dict[bytes, memoryview]()
    waiting = iter(digests)
    digest = next(waiting, None)
    while digest is not None or held:
        while digest is not None and free:
            held[digest] = free.pop()
            _submit(store, digest, held[digest], is_read=is_read)
            digest = next(waiting, None)
        for ended in store.poll(1.0):
            if ended.outcome is not Outcome.OK:
                raise OSError(f"a {ended.kind} failed: {ended.outcome}")
            free.append(held.pop(ended.digest))


def _submit(store: DiskStore, digest: bytes, buffer: memoryview, *, is_read: bool) -> None:
    if is_read:
        slot = store.find(digest)
        if slot is None:
            raise OSError(f"a record that was written is not found: {store.health.reason or 'lost'}")
        store.index.pin(slot)
        store.submit_read(slot, digest, buffer)
        return
    reserved = store.reserve(digest, digest)
    if not isinstance(reserved, Reserved):
        raise OSError(f"a record is not written: {reserved}")
    store.submit_write(reserved.slot, digest, digest, buffer)


def sync(folder: Path) -> None:
    """Wait until all segment files are on the disk, and remove them from the page cache."""
    for path in folder.glob("segment-*"):
        with path.open("rb") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_digests(number: int) -> list[bytes]:
    return [hashlib.blake2b(i.to_bytes(8, "little"), digest_size=16).digest() for i in range(number)]


def random_buffer(size: int) -> memoryview:
    """Return a buffer at the beginning of a page, with bytes that no disk can compress."""
    buffer = memoryview(mmap.mmap(-1, size))
    buffer[:] = os.urandom(size)
    return buffer
