"""Sets of compiled kernels in folders: the set of one model, GPU and settings, and whether it is complete and unchanged.

    NAME.json       the set: what it was compiled for, its folders, and each file's digest
    KEY/            the files of one kernel, or of one launcher, under Triton's own key

Triton's cache has this layout too, with further files. So a set is exported from the cache, is carried to another machine, and is
installed into the cache there. A set is named after what it was compiled for (`Purpose`). Files are installed only if their
content is what the set says, since compiled kernels are executed.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
import uuid
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import ConfigError
from engine.kernels.hardware import Gpu

_GROUP = "__grp__"  # Triton's prefix of the file that lists the other files of a kernel by their paths
_KEPT = (".cubin", ".json", ".so")  # suffixes of the files that a launch needs


class Purpose(msgspec.Struct, frozen=True):
    """What a set of kernels was compiled for. Every field decides which kernels are launched, or how they are compiled."""

    gpu: str
    model: str
    settings: str
    triton: str
    python: str
    engine: str

    @property
    def name(self) -> str:
        """A file name for the set: a digest of all fields."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:32]

    @staticmethod
    def of(gpu: Gpu, *, model: dict[str, Any], settings: dict[str, Any]) -> Purpose:
        """`model` are the model's shapes and `settings` the engine's settings, both as values that JSON can hold."""
        major, minor = gpu.capability
        return Purpose(
            gpu=f"capability {major}.{minor}, {gpu.processors} multiprocessors, {gpu.shared_memory} bytes of shared memory",
            model=json.dumps(model, sort_keys=True),
            settings=json.dumps(settings, sort_keys=True),
            triton=version("triton"),
            python=str(sysconfig.get_config_var("EXT_SUFFIX")),
            engine=_digest_of_engine(),
        )

    def differences(self, other: Purpose) -> list[str]:
        """Say in which fields `other` differs, for people."""
        mine, theirs = msgspec.structs.asdict(self), msgspec.structs.asdict(other)
        named = {"model": "the model's shapes", "engine": "Tidegate's own code"}
        return [named.get(key, f"{key} ({theirs[key]} there, {mine[key]} here)") for key in mine if mine[key] != theirs[key]]


class KernelSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A set of compiled kernels. `files` maps folder -> file -> SHA-256 of its content, as hexadecimal digits."""

    purpose: Purpose
    files: dict[str, dict[str, str]]

    @property
    def num_kernels(self) -> int:
        return sum(any(name.endswith(".cubin") for name in names) for names in self.files.values())


def describe(purpose: Purpose, folders: list[str], cache_folder: Path) -> KernelSet:
    """Make the set of the kernels that Triton's cache holds in `folders`."""
    files = {folder: _digests(cache_folder / folder) for folder in folders}
    return KernelSet(purpose, {folder: digests for folder, digests in files.items() if digests})


def read(folder: Path, purpose: Purpose) -> KernelSet | None:
    """Read the set for `purpose`. Returns None if `folder` has none. Raises ConfigError if its file cannot be read."""
    path = folder / f"{purpose.name}.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=KernelSet)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; compile the kernels again with `tidegate compile`") from error


def is_complete(found: KernelSet, cache_folder: Path) -> bool:
    """Whether Triton's cache has all files of the set."""
    return all((cache_folder / folder / name).exists() for folder, names in found.files.items() for name in names)


def prepare(folder: Path) -> None:
    """Make `folder`, and try whether files can be written there. Raises OSError if not."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(probe := folder / ".writable", b"")
    probe.unlink(missing_ok=True)


def write(found: KernelSet, folder: Path) -> None:
    """Write the set's own file to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / f"{found.purpose.name}.json", msgspec.json.format(msgspec.json.encode(found)))


def export(found: KernelSet, cache_folder: Path, target: Path) -> int:
    """Copy the set from Triton's cache to the folder `target`. Returns the number of bytes of its files."""
    size = 0
    for folder, names in found.files.items():
        (target / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            data = (cache_folder / folder / name).read_bytes()
            _replace(target / folder / name, data)
            size += len(data)
    write(found, target)
    return size


def install(found: KernelSet, source: Path, cache_folder: Path) -> None:
    """Copy the set from the folder `source` to Triton's cache, except what the cache has.

    Raises ConfigError for a file that is missing or whose content is not what the set says.
    """
    for folder, digests in found.files.items():
        contents = {name: _checked(source / folder / name, digest) for name, digest in digests.items()}
        there = cache_folder / folder
        there.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():
            if not (there / name).exists():
                _replace(there / name, data)
        main = next((name for name in digests if name.endswith(".json")), None)
        if main is not None and not (there / f"{_GROUP}{main}").exists():
            paths = {name: str(there / name) for name in digests}
            _replace(there / f"{_GROUP}{main}", json.dumps({"child_paths": paths}).encode())


def other_purposes(folder: Path) -> list[Purpose]:
    """List what the sets in `folder` were compiled for. Files that are not sets, or cannot be read, are left out."""
    purposes = []
    for path in sorted(folder.glob("*.json")):
        try:
            purposes.append(msgspec.json.decode(path.read_bytes(), type=KernelSet).purpose)
        except (OSError, msgspec.MsgspecError):
            continue
    return purposes


def _checked(path: Path, digest: str) -> bytes:
    remedy = "compile the kernels again with `tidegate compile`"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}, a compiled kernel's file, cannot be read: {error}; {remedy}") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise ConfigError(f"{path}, a compiled kernel's file, was changed after it was compiled; {remedy}")
    return data


def _digests(folder: Path) -> dict[str, str]:
    names = sorted(path.name for path in folder.iterdir() if path.suffix in _KEPT and not path.name.startswith(_GROUP))
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def _replace(path: Path, data: bytes) -> None:
    """Write a file such that nobody sees it incomplete.

    Containers that share a folder may have equal process ids, so the temporary name is random.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@cache
def _digest_of_engine() -> str:
    """Return a digest of the engine's source code, in which any change may change a kernel or the steps that launch it."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]
