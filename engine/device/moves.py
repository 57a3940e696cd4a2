"""BlockCopies carries out the copies of plans: within the KV cache of the device, and between it and the host tier.

    GPU -> host    pack blocks into a buffer | beside the steps: buffer -> records of the host
    host -> GPU    beside the steps: records of the host -> buffer, unpack into blocks

A record has all pools of a block in one piece, so a block is one transfer. Packing is short, and is done in the order of the
steps; the blocks may then be overwritten at once. The transfers run on streams of their own, one for each direction. On a CPU
there are no streams: the same calls are done when they return.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import torch

from engine.batch import HOST, LayerPools, Upload
from engine.errors import InternalError
from engine.kvcache.host import HostRecords
from engine.kvcache.host_memory import HostMemory
from engine.kvcache.storage import KVStorage
from engine.plan import Arrival, BlockCopy, Place, Tier

BUFFER_BYTES = 128 << 20
NUM_BUFFERS = 3  # two for blocks that leave, so that packing need not wait for the transfer before; one for blocks that come


def buffer_bytes(record_bytes: int, num_slots: int) -> int:
    """Return the bytes of device memory that moves between the device and a host tier of `num_slots` records need."""
    return NUM_BUFFERS * _buffer_records(record_bytes, num_slots) * record_bytes


def _buffer_records(record_bytes: int, num_slots: int) -> int:
    return min(num_slots, max(1, BUFFER_BYTES // record_bytes))


class _Batch:
    """Moves that end together. `index` is kept until then, since a stream reads it that torch does not know to use it."""

    def __init__(self, places: list[Place], index: torch.Tensor, done: torch.cuda.Event | None) -> None:
        self.places = places
        self.index = index
        self.done = done  # None on a CPU, where the moves have ended

    def has_ended(self) -> bool:
        return self.done is None or bool(self.done.query())  # type: ignore[no-untyped-call]


class BlockCopies:
    """Copies blocks of `storage`, and moves them to and from the slots of `memory`. Call under inference mode."""

    def __init__(self, storage: KVStorage, upload: Upload, device: torch.device, memory: HostMemory | None = None) -> None:
        self._storage = storage
        self._upload = upload
        self._under_way: list[_Batch] = []
        self._host: HostRecords | None = None
        if memory is None:
            return
        num = _buffer_records(storage.record_bytes, memory.num_slots)
        self._host = HostRecords(memory, storage.word, on_cuda=device.type == "cuda")
        *leaving, self._arriving = (
            torch.empty(num, storage.record_words, dtype=storage.word, device=device) for _ in range(NUM_BUFFERS)
        )
        self._leaving: list[tuple[torch.Tensor, torch.cuda.Event | None]] = [(buffer, None) for buffer in leaving]
        self._out = _stream(device)
        self._in = _stream(device)

    def run(self, copies: list[BlockCopy]) -> None:
        """Submit the copies of a plan, in their order."""
        for (src, dst), group in groupby(copies, lambda copy: (copy.src.tier, copy.dst.tier)):
            if src is dst:
                self._storage.copy(list(group), self._upload)
            elif src is Tier.GPU:
                self._move_out(list(group))
            else:
                self._move_in(list(group))

    def with_host(self) -> list[LayerPools]:
        """Return the pools of each layer, and under names with the prefix HOST the same pools in the slots of the host."""
        views = self._storage.views(self._records())
        return [
            pools | {HOST + name: pool for name, pool in view.items()}
            for pools, view in zip(self._storage.layers, views, strict=True)
        ]

    def poll(self, seconds: float) -> list[Arrival]:
        """Return the moves that have ended. If there is none and `seconds` is not 0, wait for the first batch.

        A batch is at most BUFFER_BYTES, which take a few milliseconds, so `seconds` itself is not measured.
        """
        if not self._under_way:
            return []
        first = self._under_way[0].done
        if seconds and first is not None and not any(batch.has_ended() for batch in self._under_way):
            first.synchronize()
        ended = [batch for batch in self._under_way if batch.has_ended()]
        self._under_way = [batch for batch in self._under_way if batch not in ended]
        return [Arrival(place, ok=True) for batch in ended for place in batch.places]

    def close(self) -> None:
        """Wait for all moves and free the host tier."""
        for batch in self._under_way:
            if batch.done is not None:
                batch.done.synchronize()
        if self._host is not None:
            self._host.close()

    def _move_out(self, copies: list[BlockCopy]) -> None:
        records = self._records()
        for batch in self._batches(copies):
            buffer, free = self._leaving.pop(0)
            if free is not None:
                torch.cuda.current_stream().wait_event(free)
            blocks = self._index([copy.src for copy in batch])
            self._storage.pack(blocks, buffer[: len(batch)])
            with _beside(self._out):
                for record, copy in zip(buffer, batch, strict=False):
                    records[copy.dst.number].copy_(record, non_blocking=True)
                done = self._started(batch, blocks)
            self._leaving.append((buffer, done))

    def _move_in(self, copies: list[BlockCopy]) -> None:
        records = self._records()
        for batch in self._batches(copies):
            blocks = self._index([copy.dst for copy in batch])
            with _beside(self._in):
                for record, copy in zip(self._arriving, batch, strict=False):
                    record.copy_(records[copy.src.number], non_blocking=True)
                self._storage.unpack(self._arriving[: len(batch)], blocks)
                self._started(batch, blocks)

    def _batches(self, copies: list[BlockCopy]) -> Iterator[list[BlockCopy]]:
        """Divide copies into batches that fit into a buffer."""
        size = self._arriving.shape[0]
        for at in range(0, len(copies), size):
            yield copies[at : at + size]

    def _started(self, copies: Sequence[BlockCopy], index: torch.Tensor) -> torch.cuda.Event | None:
        """Note that the work submitted last, on the present stream, ends the moves of `copies`."""
        done = None
        if index.is_cuda:
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record()
        self._under_way.append(_Batch([copy.dst for copy in copies], index, done))
        return done

    def _index(self, places: list[Place]) -> torch.Tensor:
        (index,) = self._upload([np.array([place.number for place in places], np.int64)])
        return index

    def _records(self) -> torch.Tensor:
        if self._host is None:
            raise InternalError("a plan moves blocks to or from a host tier that this runner does not have")
        return self._host.records


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


@contextmanager
def _beside(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Submit work to `stream`, to begin after all that the present stream has been given so far."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
