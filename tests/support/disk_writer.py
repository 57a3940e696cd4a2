"""A process that writes, reads and forgets records of a disk tier until it is killed. Run as a module:

    python -m tests.support.disk_writer FOLDER SEED NUM_RECORDS PAYLOAD_BYTES

It prints "written NUMBER" once the record of NUMBER can be found, and "forgotten NUMBER" once all records of its family are
erased.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from engine.kvcache.disk.index import Reserved
from engine.kvcache.disk.outcome import Outcome
from engine.kvcache.disk.store import DiskStore
from engine.kvcache.disk.workers import Kind
from tests.support.disk_store import aligned, digest_of, family_of, open_store, payload_of, scanned, wait_for

MAX_MOVES = 8  # on their way at a time


class Writer:
    def __init__(self, store: DiskStore, seed: int) -> None:
        self.store = store
        self.rng = random.Random(seed)
        self.num_bytes = store.files.record.payload_bytes
        self.buffers: dict[int, tuple[int, memoryview | bytes]] = {}  # slot -> number and buffer of the move on its way
        self.next_number = seed * 1_000_000

    def step(self) -> None:
        while len(self.buffers) < MAX_MOVES:
            number = self.next_number
            self.next_number += 1
            self.write(number)
            if self.rng.random() < 0.3:
                self.read(number - self.rng.randrange(1, 20))
        if self.rng.random() < 0.02:
            self.forget(self.next_number - self.rng.randrange(20, 40))
        for move in self.store.poll(1.0):
            number, buffer = self.buffers.pop(move.slot)
            if move.outcome is not Outcome.OK or buffer != payload_of(digest_of(number), self.num_bytes):
                raise SystemExit(f"the {move.kind} of {number} ended with {move.outcome}, or with wrong bytes")
            if move.kind is Kind.WRITE:
                print("written", number, flush=True)

    def write(self, number: int) -> None:
        reserved = self.store.reserve(digest_of(number), family_of(number))
        if isinstance(reserved, Reserved):
            payload = payload_of(digest_of(number), self.num_bytes)
            self.buffers[reserved.slot] = (number, payload)
            self.store.submit_write(reserved.slot, digest_of(number), family_of(number), aligned(payload))

    def read(self, number: int) -> None:
        slot = self.store.find(digest_of(number))
        if slot is not None and slot not in self.buffers:
            into = aligned(bytes(self.num_bytes))
            self.buffers[slot] = (number, into)
            self.store.index.pin(slot)
            self.store.submit_read(slot, digest_of(number), into)

    def forget(self, number: int) -> None:
        if self.store.find(digest_of(number)) is not None:
            while self.buffers:
                for move in self.store.poll(1.0):
                    print("written" if move.kind is Kind.WRITE else "read", self.buffers.pop(move.slot)[0], flush=True)
            self.store.forget_family(family_of(number))
            wait_for(self.store, lambda: not self.store.index.condemned)
            print("forgotten", number, flush=True)


def main() -> None:
    folder, seed, num_records, num_bytes = sys.argv[1:]
    writer = Writer(scanned(open_store(Path(folder), int(num_records), int(num_bytes))), int(seed))
    while True:
        writer.step()


if __name__ == "__main__":
    main()
