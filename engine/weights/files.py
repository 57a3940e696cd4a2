"""Finds and opens the safetensors files of a checkpoint folder, without reading their data.

Tensors get the names that a text model has. In a model that also sees images, the text model's tensors have a prefix.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import CheckpointError
from engine.models.config_reader import read_json
from engine.models.formats import other_format

INDEX = "model.safetensors.index.json"
STANDARD = "model.safetensors"
# What a name may begin with in a model that also sees images or that was saved without its head, and the beginning that it has in
# a text model.
PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("embed_tokens.", "model.embed_tokens."),
    ("layers.", "model.layers."),
    ("norm.", "model.norm."),
)

log = logging.getLogger("tidegate.engine")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a safetensors file whose data has not been read. `name` is its name in the file."""

    name: str
    file: Path
    handle: Any
    shape: tuple[int, ...]
    dtype: str

    def refuse(self, why: str) -> NoReturn:
        raise CheckpointError(f"{self.file}: tensor {self.name} {why}", param="model")

    def read(self) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self.handle.get_tensor(self.name)
        except SafetensorError as error:
            self.refuse(f"cannot be read: {error}")
        return tensor

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read the rows from `start` to `stop`, or to the end, of a matrix."""
        try:
            tensor: torch.Tensor = self.handle.get_slice(self.name)[start:stop]
        except SafetensorError as error:
            self.refuse(f"cannot be read: {error}")
        return tensor


def open_folder(folder: Path, stack: ExitStack) -> dict[str, Stored]:
    """Return every tensor of the checkpoint by its name in a text model, from the one file or the shards that the index lists.

    An index may list tensors that no shard has: the model's own list of tensors decides what is missing.
    """
    stored: dict[str, Stored] = {}
    for file in weight_files(folder):
        for tensor in _open_file(file, stack):
            name = text_name(tensor.name)
            if name in stored:
                tensor.refuse(f"is also in {stored[name].file}")
            stored[name] = tensor
    return stored


def weight_files(folder: Path) -> list[Path]:
    """List the files of weights: the shards that the index names, or the one file. Raises CheckpointError if one is missing."""
    return [folder / shard for shard in _shards(folder)] or [_single_file(folder)]


def _shards(folder: Path) -> list[str]:
    """List the files that the index names; none if there is no index, or if a whole file beside it makes it idle."""
    path = folder / INDEX
    if not path.exists():
        return []
    shards = read_json(path).get("weight_map")
    if (folder / STANDARD).is_file() and not (isinstance(shards, dict) and STANDARD in shards.values()):
        log.warning("%s: it is not read, since %s is there too, and is taken to be the whole checkpoint", path, STANDARD)
        return []
    if not isinstance(shards, dict) or not shards or not all(isinstance(s, str) for s in shards.values()):
        raise CheckpointError(f"{path}: weight_map must map tensor names to file names", param="model")
    for name, shard in shards.items():
        if Path(shard).name != shard:
            raise CheckpointError(f"{path}: tensor {name} is in {shard!r}: it must be a file of this folder", param="model")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard}: no such file, although {INDEX} lists it for tensor {name}", param="model")
    return sorted(set(shards.values()))


def _single_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    standard = folder / STANDARD
    if standard in files or len(files) == 1:
        return standard if standard in files else files[0]
    if files:
        raise CheckpointError(f"{folder}: {len(files)} .safetensors files but no {INDEX}", param="model")
    other = other_format(folder) or ", and no other format is read"
    raise CheckpointError(f"{folder}: no .safetensors file{other}", param="model")


def _open_file(file: Path, stack: ExitStack) -> list[Stored]:
    try:
        handle = stack.enter_context(safe_open(str(file), framework="pt"))
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
        return [Stored(n, file, handle, tuple(s.get_shape()), str(s.get_dtype())) for n, s in slices.items()]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a complete safetensors file: {error}", param="model") from None


def text_name(name: str) -> str:
    """Return the name that the tensor `name` has in a text model."""
    for prefix, short in PREFIXES:
        if name.startswith(prefix):
            return short + name.removeprefix(prefix)
    return name
