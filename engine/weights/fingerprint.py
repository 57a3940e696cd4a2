"""The fingerprint of a checkpoint: a digest by which KV blocks of one model are kept apart from those of another.

Blocks on disk outlive the engine that computed them, so it covers config.json and every byte of the weights: a change of one row
of one matrix changes what the model computes. Threads read the files, which are in the page cache once the model is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from engine.config import EngineConfig
from engine.errors import CheckpointError
from engine.startup import Progress, no_report
from engine.weights.files import weight_files

KV_VERSION = 1  # raise it when a change of the code alters what a block holds for the same checkpoint
PART_BYTES = 64 << 20
READ_BYTES = 4 << 20
MAX_THREADS = 8


def fingerprint(config: EngineConfig, progress: Progress = no_report) -> str:
    """Return the fingerprint of the checkpoint that the resolved `config` loads, and of the type in which the model computes.

    Raises CheckpointError if a file cannot be read.
    """
    folder = Path(config.model)
    state = hashlib.blake2b(digest_size=16)
    state.update(json.dumps([KV_VERSION, config.dtype, config.load_format]).encode())
    try:
        state.update((folder / "config.json").read_bytes())
        if config.load_format == "dummy":
            state.update(str(config.seed).encode())
            return state.hexdigest()
        for digest in _digests(weight_files(folder), progress):
            state.update(digest)
    except OSError as error:
        raise CheckpointError(f"{folder}: the checkpoint cannot be read for its fingerprint: {error}", param="model") from error
    return state.hexdigest()


def _digests(files: list[Path], progress: Progress) -> Iterator[bytes]:
    """Yield a digest of each part of each file, in order. XXH3 tells different files apart; it need not resist an attacker, who
    could replace the whole checkpoint."""
    parts = [(file, begin) for file in files for begin in range(0, max(1, file.stat().st_size), PART_BYTES)]
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
        for digest in threads.map(_digest, parts):
            progress()
            yield digest


def _digest(part: tuple[Path, int]) -> bytes:
    file, at = part
    end, state, buffer = at + PART_BYTES, xxhash.xxh3_128(), memoryview(bytearray(READ_BYTES))
    with file.open("rb", buffering=0) as opened:
        while at < end and (num := os.preadv(opened.fileno(), [buffer[: end - at]], at)):
            state.update(buffer[:num])
            at += num
    return state.digest()
