"""Reads and writes shards: files of documents, one JSON object per line, compressed with xz.

A line holds {"source", "path", "text"} and the fields that its writer adds.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.neardup import Signature

PRESET = 9  # xz preset 9 has a dictionary of 64 MiB, which holds a whole shard


class Document(NamedTuple):
    source: str  # name of the package
    path: str  # path of the file inside the package
    text: str
    signature: Signature

    @property
    def size(self) -> int:
        """Return the size of the text in bytes of UTF-8."""
        return len(self.text.encode())

    @property
    def is_code(self) -> bool:
        return self.path.endswith(".py")


def cut(documents: Sequence[Document], count: int) -> list[list[Document]]:
    """Split documents into `count` runs of similar size. The order stays, since similar neighbours compress well together."""
    total, done = max(1, sum(document.size for document in documents)), 0
    runs: list[list[Document]] = [[] for _ in range(count)]
    for document in documents:
        runs[done * count // total].append(document)
        done += document.size
    return runs


def write(path: Path, rows: Iterable[dict[str, str]]) -> tuple[str, int]:
    """Write `rows` to the shard `path`. Returns the sha256 of the uncompressed content and the compressed size in bytes."""
    content = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(lzma.compress(content, preset=PRESET))
    os.replace(partial, path)
    return hashlib.sha256(content).hexdigest(), path.stat().st_size


def training_files(corpus: Path) -> list[Path]:
    """Return the paths of the shards that the manifest in the folder `corpus` lists.

    Raises SystemExit if there is no manifest, since an incomplete corpus may hold text that is held out.
    """
    manifest = corpus / "manifest.json"
    if not manifest.is_file():
        raise SystemExit(f"{manifest}: no such file; `python -m train.corpus` writes it last")
    return [corpus / name for name in json.loads(manifest.read_text("utf-8"))["shards"]]


def read(path: Path) -> Iterator[dict[str, Any]]:
    with lzma.open(path, "rt", encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)
