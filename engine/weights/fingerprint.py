"""The fingerprint of a checkpoint: a digest by which KV blocks of one model are kept apart from those of another.

It covers config.json, the header of every file of weights, and SAMPLE_BYTES bytes from the middle of every tensor. Reading all
bytes would take as long as loading the model. Training and merging change all values of a tensor, and so its middle.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import CheckpointError
from engine.weights.files import weight_files

SAMPLE_BYTES = 256
HEADER_LENGTH_BYTES = 8  # a safetensors file begins with the length of its header, little-endian


def fingerprint(config: EngineConfig) -> str:
    """Return the fingerprint of the checkpoint that the resolved `config` loads, and of the type in which the model computes.

    Raises CheckpointError if a file cannot be read.
    """
    folder = Path(config.model)
    state = hashlib.blake2b(digest_size=16)
    state.update(json.dumps([config.dtype, config.load_format]).encode())
    try:
        state.update((folder / "config.json").read_bytes())
        if config.load_format == "dummy":
            state.update(str(config.seed).encode())
            return state.hexdigest()
        for file in weight_files(folder):
            for part in _parts(file):
                state.update(part)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: the checkpoint cannot be read for its fingerprint: {error}", param="model") from error
    return state.hexdigest()


def _parts(file: Path) -> list[bytes]:
    """Return the file's size, its header, and a sample of each tensor in the order of the file."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(HEADER_LENGTH_BYTES), "little")
        header = opened.read(length)
        data = HEADER_LENGTH_BYTES + length
        tensors = [value for name, value in json.loads(header).items() if name != "__metadata__"]
        spans = sorted(tuple(tensor["data_offsets"]) for tensor in tensors)
        samples = [_sample(opened.fileno(), data + begin, data + end) for begin, end in spans]
        return [str(os.fstat(opened.fileno()).st_size).encode(), header, *samples]


def _sample(descriptor: int, begin: int, end: int) -> bytes:
    at = begin + max(0, end - begin - SAMPLE_BYTES) // 2
    return os.pread(descriptor, min(SAMPLE_BYTES, end - at), at)
