"""Drives a DiskStore as the engine's loop does: submit, then poll until the move has ended."""

from __future__ import annotations

import hashlib
import mmap
from pathlib import Path

from engine.kvcache.disk.index import Reserved
from engine.kvcache.disk.outcome import Outcome
from engine.kvcache.disk.settings import DiskSettings
from engine.kvcache.disk.store import DiskStore
from engine.kvcache.disk.write_policy import Refusal

STUCK = 30.0  # seconds after which a wait is taken for a hang


def digest_of(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


def family_of(number: int) -> bytes:
    """Return the family of `digest_of(number)` in the tests that write families: four blocks in a row are one."""
    return digest_of(number - number % 4)


def payload_of(digest: bytes, num_bytes: int) -> bytes:
    """Return the bytes that the tests write under `digest`."""
    return hashlib.shake_128(digest).digest(num_bytes)


def aligned(payload: bytes) -> memoryview:
    """Return a copy of `payload` at the beginning of a page, as direct I/O needs it."""
    buffer = memoryview(mmap.mmap(-1, len(payload)))
    buffer[:] = payload
    return buffer


def open_store(folder: Path, num_records: int, payload_bytes: int = 5000, *, form: bytes = b"form", **settings) -> DiskStore:
    """Return a store with room for `num_records`, in files of four, whose clock a test may pass as `clock`."""
    stride = 4096 + -(-payload_bytes // 4096) * 4096
    segments = -(-num_records // 4)
    clock = {"clock": settings.pop("clock")} if "clock" in settings else {}
    settings = {
        "max_bytes": num_records * stride + segments * 4096,
        "segment_bytes": 4096 + 4 * stride,
        "num_threads": 2,
        **settings,
    }
    return DiskStore(DiskSettings(folder=folder, **settings), payload_bytes, form, **clock)


def wait_for(store: DiskStore, condition) -> None:
    """Poll until `condition()` is true. The store ends the wait itself by its news."""
    for _ in range(100_000):
        if condition():
            return
        store.poll(0.01)
    raise AssertionError("the disk store did not get there")


def scanned(store: DiskStore) -> DiskStore:
    wait_for(store, lambda: store.is_scanned)
    return store


def end_of_move(store: DiskStore) -> Outcome:
    """Return the outcome of the only move on its way."""
    for _ in range(1000):
        if ended := store.poll(STUCK / 1000):
            (move,) = ended
            return move.outcome
    raise AssertionError("the move did not end")


def write(store: DiskStore, digest: bytes, payload: bytes | None = None, family: bytes | None = None) -> Outcome | Refusal:
    """Write the record of `digest`, by default with `payload_of(digest)` and as a first block, which is its own family.

    Returns how it ended, or why it was refused.
    """
    family = family or digest
    payload = payload_of(digest, store.files.record.payload_bytes) if payload is None else payload
    reserved = store.reserve(digest, family)
    if not isinstance(reserved, Reserved):
        return reserved
    assert store.submit_write(reserved.slot, digest, family, aligned(payload))
    return end_of_move(store)


def read(store: DiskStore, digest: bytes) -> bytes | Outcome | None:
    """Return the payload of `digest`, or why the read failed, or None if the store does not find it."""
    slot = store.find(digest)
    if slot is None:
        return None
    store.index.pin(slot)
    into = memoryview(mmap.mmap(-1, store.files.record.payload_bytes))
    assert store.submit_read(slot, digest, into)
    outcome = end_of_move(store)
    return bytes(into) if outcome is Outcome.OK else outcome


def is_right(store: DiskStore, digest: bytes) -> bool:
    """Return whether the record of `digest` is found and has the payload that the tests write."""
    return read(store, digest) == payload_of(digest, store.files.record.payload_bytes)
