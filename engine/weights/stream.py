"""Streams a checkpoint's bytes from its files to a CUDA device with several reader threads.

    file --pread--> pinned buffer --copy on the reader's own stream--> the parameter itself
                                                                   '-> raw bytes on the device, decoded into the parameter

Each reader has two buffers and fills one while the other is copied. A large tensor is split so that several readers share it.
A tensor that must be converted, or whose target is not contiguous, is read by one reader, which also needs device memory for
the raw bytes. The plain twin is the loop in `loader.py`, which reads each tensor with the safetensors library.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import NamedTuple, NoReturn

import msgspec
import torch

from engine.errors import CheckpointError
from engine.startup import Progress, no_report

READERS = 8  # number of reader threads; one delivers 5 GB/s from the page cache, and the bus carries 54 GB/s
PIECE = 16 << 20  # size in bytes of a buffer, and of one read

Decode = Callable[..., torch.Tensor]


class Source(NamedTuple):
    """A tensor in a safetensors file. `offset` is its first byte, counted from the start of the file."""

    name: str
    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def refuse(self, why: object) -> NoReturn:
        raise CheckpointError(f"{self.file}: tensor {self.name} cannot be read: {why}", param="model")


class Transfer(NamedTuple):
    """One copy from a checkpoint to a parameter. `target` is filled with `decode(*sources)`, computed on the target's device.

    Without `decode`, `target` is filled with its single source.
    """

    target: torch.Tensor
    sources: tuple[Source, ...]
    decode: Decode | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the file's bytes can be copied into the target without conversion."""
        return self.decode is None and self.target.dtype == self.sources[0].dtype and self.target.is_contiguous()


class _Part(NamedTuple):
    """One unit of a reader's work: PIECE bytes, from `start` on, of a plain transfer, or the whole of any other transfer."""

    transfer: Transfer
    start: int = 0


def offsets(file: Path) -> dict[str, int]:
    """Map each tensor of a safetensors file to its first byte. The caller has checked that the file is complete."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = msgspec.json.decode(opened.read(size))
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def fill(transfers: Iterable[Transfer], device: torch.device, progress: Progress = no_report) -> None:
    """Run all transfers with several reader threads, and return once every target is filled.

    Readers call `progress` after each piece.

    Raises CheckpointError for a file that cannot be read fully.
    """
    in_file_order = sorted(transfers, key=lambda t: (t.sources[0].file, t.sources[0].offset))
    parts = deque(part for transfer in in_file_order for part in _parts(transfer))
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # the targets' memory may still be written by queued work
    with ExitStack() as stack:
        files = {s.file: -1 for t in in_file_order for s in t.sources}
        for file in files:
            files[file] = stack.enter_context(file.open("rb", buffering=0)).fileno()
        with ThreadPoolExecutor(READERS, "weights") as pool:
            for reader in [pool.submit(_work, parts, files, device, progress) for _ in range(READERS)]:
                reader.result()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # frees the raw bytes' memory, which is bound to the readers' streams


def _parts(transfer: Transfer) -> list[_Part]:
    if not transfer.is_plain:
        return [_Part(transfer)]
    return [_Part(transfer, start) for start in range(0, transfer.target.nbytes, PIECE)]


def _work(parts: deque[_Part], files: dict[Path, int], device: torch.device, progress: Progress) -> None:
    """Run one reader thread: take parts until none is left, or until this or another reader fails."""
    reader = _Reader(files, device)
    try:
        # Inference mode is set per thread, and the targets were created under it.
        with torch.inference_mode(), reader.context():
            while parts:
                try:
                    part = parts.popleft()
                except IndexError:  # another reader took the last part
                    return
                reader.run(part)
                progress()
    finally:
        parts.clear()
        reader.finish()


class _Reader:
    """A reader's two alternating buffers and its copy stream. On a CPU there is no stream, and no buffer is pinned."""

    def __init__(self, files: dict[Path, int], device: torch.device) -> None:
        self._files = files
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        buffers = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=self._stream is not None) for _ in range(2)]
        self._idle = deque[tuple[torch.Tensor, torch.cuda.Event | None]]((buffer, None) for buffer in buffers)

    def context(self) -> torch.cuda.StreamContext | nullcontext[None]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def finish(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def run(self, part: _Part) -> None:
        target, sources, decode = part.transfer
        if part.transfer.is_plain:
            data = target.reshape(-1).view(torch.uint8)[part.start : part.start + PIECE]
            self._copy(sources[0], part.start, data)
        else:
            tensors = [self._whole(source) for source in sources]
            target.copy_(tensors[0] if decode is None else decode(*tensors))

    def _whole(self, source: Source) -> torch.Tensor:
        tensor = torch.empty(source.shape, dtype=source.dtype, device=self._device)
        self._copy(source, 0, tensor.reshape(-1).view(torch.uint8))
        return tensor

    def _copy(self, source: Source, start: int, data: torch.Tensor) -> None:
        """Copy the source's bytes, from `start` on, into `data` until `data` is full."""
        for part in torch.split(data, PIECE):
            buffer, emptied = self._idle.popleft()
            if emptied is not None:
                emptied.synchronize()
            staged = buffer[: part.numel()]
            self._read(source, start, staged.numpy().data)
            part.copy_(staged, non_blocking=True)
            self._idle.append((buffer, None if self._stream is None else self._stream.record_event()))
            start += part.numel()

    def _read(self, source: Source, start: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            try:
                num = os.preadv(self._files[source.file], [into[done:]], source.offset + start + done)
            except OSError as error:
                source.refuse(error)
            if num == 0:
                source.refuse("the file ends before it")
            done += num
