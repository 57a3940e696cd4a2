"""Reads a package's unpacked files as documents, and counts for each reason how many files were dropped.

Each package is read once. The result is kept in a file, so that an interrupted run continues; a package is read again if its
source or the code that reads it has changed.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np

from train import filters, htmltext, neardup
from train.fetch import Source, wanted
from train.filters import clean, why_dropped, why_refused
from train.htmltext import html_to_text
from train.neardup import signature
from train.shards import Document

CODE = [Path(__file__), *(Path(str(module.__file__)) for module in (filters, htmltext, neardup))]


class Tally(msgspec.Struct):
    """Counts how many files of one source were found, kept, and dropped for each reason."""

    licence: str
    files: int = 0
    kept: int = 0
    kept_bytes: int = 0
    dropped: Counter[str] = msgspec.field(default_factory=Counter)

    def check(self, name: str) -> None:
        assert self.files == self.kept + self.dropped.total(), (
            f"{name}: {self.files} files, {self.kept} kept, {self.dropped} dropped"
        )


class _Stored(msgspec.Struct):
    """The result of reading one package, as stored in a file. A document is stored as path, text and the bytes of its
    signature."""

    licence: str
    files: int
    dropped: dict[str, int]
    documents: list[tuple[str, str, bytes]]


def read_document(file: Path, source: str, path: str) -> Document | str:
    """Return the document at `file`, or the reason why the file is dropped."""
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return "not_utf8"
    if path.endswith(".html"):
        text = html_to_text(text)
    refused = why_refused(text)
    if refused:
        return refused
    text = clean(text)
    return why_dropped(text, python=path.endswith(".py")) or Document(source, path, text, signature(text))


def read_source(name: str, source: Source, unpacked: Path) -> tuple[Tally, list[Document]]:
    tally, documents = Tally(source.licence), []
    folder = unpacked / name
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder).as_posix()
        if not file.is_file() or not wanted(path, source):
            continue
        tally.files += 1
        result = read_document(file, name, path)
        if isinstance(result, str):
            tally.dropped[result] += 1
        else:
            documents.append(result)
    return tally, documents


def read_once(name: str, source: Source, unpacked: Path, kept: Path) -> tuple[Tally, list[Document]]:
    """Read the documents of one source. The result is stored in the folder `kept`, and the next call takes it from there."""
    code = b"".join(file.read_bytes() for file in CODE)
    file = kept / f"{name}.{hashlib.sha256(msgspec.json.encode(source) + code).hexdigest()[:16]}"
    if file.is_file():
        return _load(name, file)
    tally, documents = read_source(name, source, unpacked)
    rows = [(document.path, document.text, document.signature.tobytes()) for document in documents]
    stored = _Stored(licence=tally.licence, files=tally.files, dropped=dict(tally.dropped), documents=rows)
    kept.mkdir(parents=True, exist_ok=True)
    for old in kept.glob(f"{name}.????????????????"):
        old.unlink()
    partial = file.with_name(file.name + ".partial")
    partial.write_bytes(msgspec.msgpack.encode(stored))
    os.replace(partial, file)
    return tally, documents


def _load(name: str, file: Path) -> tuple[Tally, list[Document]]:
    stored = msgspec.msgpack.decode(file.read_bytes(), type=_Stored)
    tally = Tally(stored.licence, files=stored.files, dropped=Counter(stored.dropped))
    return tally, [Document(name, path, text, np.frombuffer(raw, np.uint32)) for path, text, raw in stored.documents]
