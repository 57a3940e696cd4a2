"""Builds the corpus: unpacked files are filtered, deduplicated, and split into held-out text and 16 training shards.

    unpacked files --filters--> documents --hash--> no exact duplicates --MinHash--> no near-duplicates
        --rank of hash--> held out: HELDOUT_BYTES, to train/heldout.jsonl.xz
        +-- the rest --> corpus/train-00.jsonl.xz ... train-15.jsonl.xz

Only the names of the files that remain after deduplication decide which of them are held out. The manifest says how similar the
held-out text is to the training text (`nearest`). For every source, files found = files kept + files dropped for each reason
(`Tally.check`). The same sources give the same files, byte for byte. `train.fetch` fetches the sources, `train.reading` reads the
files, and `train.filters` has the quality rules.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import typer

from engine.errors import ConfigError
from train import shards
from train.fetch import WORK, Source, Work, is_unpacked, load_sources, progress
from train.neardup import near_duplicates
from train.reading import Tally, read_once
from train.shards import Document

HELDOUT = Path(__file__).with_name("heldout.jsonl.xz")
NOTICES = "heldout-copyright.txt.xz"  # the copyright notices that must accompany the held-out files
HELDOUT_BYTES = 1_000_000  # least size of the held-out text: files are held out in order of rank until they reach it
SEED = 2026  # a part of what is hashed to give a document's rank
SHARDS = 16
MAX_COMPRESSED = 44_000_000  # bytes of all shards together, so that copying them to a GPU machine takes seconds
CODE_BYTES = 200_000_000  # most bytes of code to train on; files of the highest ranks are left out beyond it
PROSE_BYTES = 58_000_000
PROCESSES = 2


class Split(NamedTuple):
    heldout: list[Document]
    train: list[Document]
    left_out: list[Document]  # documents that would exceed CODE_BYTES or PROSE_BYTES


def deduplicate(documents: Iterable[Document], tallies: dict[str, Tally]) -> list[Document]:
    """Return the documents in order, without exact duplicates and near-duplicates of earlier documents."""
    seen: set[bytes] = set()
    distinct = []
    for document in documents:
        digest = hashlib.sha256(document.text.encode()).digest()
        if digest in seen:
            tallies[document.source].dropped["exact_duplicate"] += 1
        else:
            seen.add(digest)
            distinct.append(document)
    kept = []
    for document, near in zip(distinct, near_duplicates([each.signature for each in distinct]), strict=True):
        if near:
            tallies[document.source].dropped["near_duplicate"] += 1
        else:
            kept.append(document)
    return kept


def rank(document: Document) -> bytes:
    """Return the rank of a document, which decides whether it is held out. The rank is a hash of the document's name, so that
    nobody chooses."""
    return hashlib.sha256(f"{SEED}/{document.source}/{document.path}".encode()).digest()


def split(documents: Sequence[Document], heldout_bytes: int, code_bytes: int, prose_bytes: int) -> Split:
    result = Split([], [], [])
    held, budget = 0, {True: code_bytes, False: prose_bytes}
    for document in sorted(documents, key=rank):
        if held < heldout_bytes:
            result.heldout.append(document)
            held += document.size
        elif document.size <= budget[document.is_code]:
            result.train.append(document)
            budget[document.is_code] -= document.size
        else:
            result.left_out.append(document)
    for part in result:
        part.sort(key=lambda document: (document.source, document.path))
    return result


def nearest(heldout: Sequence[Document], train: Sequence[Document]) -> float:
    """Return the highest similarity between a held-out document and a training document. Every pair is compared."""
    signatures = np.stack([document.signature for document in train])
    return max(float((signatures == document.signature).mean(1).max()) for document in heldout)


def read_sources(sources: dict[str, Source], unpacked: Path) -> tuple[dict[str, Tally], list[Document]]:
    """Read the documents of every source. The result is in the order of `sources`, whichever source is read first."""
    absent = [name for name, source in sources.items() if not is_unpacked(name, source, unpacked)]
    if absent:
        raise ConfigError(
            f"{len(absent)} sources are not in {unpacked} ({', '.join(absent[:3])}, ...): run `python -m train.fetch`"
        )
    results: dict[str, tuple[Tally, list[Document]]] = {}
    with progress() as bar, ProcessPoolExecutor(PROCESSES) as pool:
        task = bar.add_task("read", total=len(sources))
        kept = unpacked.parent / "documents"
        calls = {pool.submit(read_once, name, source, unpacked, kept): name for name, source in sources.items()}
        for call in as_completed(calls):
            results[calls[call]] = call.result()
            bar.advance(task)
    tallies = {name: results[name][0] for name in sources}
    return tallies, [document for name in sources for document in results[name][1]]


def write_shards(documents: Sequence[Document], folder: Path) -> dict[str, Any]:
    """Write the training shards, and return the manifest's entry for each shard."""
    written = {}
    with progress() as bar, ProcessPoolExecutor(PROCESSES) as pool:
        task = bar.add_task("compress", total=SHARDS)
        calls = {}
        for index, run in enumerate(shards.cut(documents, SHARDS)):
            path = folder / f"train-{index:02d}.jsonl.xz"
            rows = [{"source": document.source, "path": document.path, "text": document.text} for document in run]
            calls[pool.submit(shards.write, path, rows)] = (path.name, run)
        for call in as_completed(calls):
            name, run = calls[call]
            digest, compressed = call.result()
            written[name] = {**_size(run), "compressed_bytes": compressed, "sha256_uncompressed": digest}
            bar.advance(task)
    return dict(sorted(written.items()))


def write_heldout(documents: Sequence[Document], licences: dict[str, str], path: Path) -> dict[str, Any]:
    rows = (
        {"source": document.source, "licence": licences[document.source], "path": document.path, "text": document.text}
        for document in documents
    )
    digest, compressed = shards.write(path, rows)
    return {**_size(documents), "compressed_bytes": compressed, "sha256_uncompressed": digest}


def write_notices(documents: Sequence[Document], sources: dict[str, Source], unpacked: Path, path: Path) -> None:
    """Write the copyright file of each package that a held-out document comes from."""
    names = sorted({sources[document.source].copyright or document.source for document in documents})
    texts = [(unpacked / name / "usr/share/doc" / name / "copyright").read_text("utf-8") for name in names]
    parts = [f"==== {name} ====\n\n{text}\n" for name, text in zip(names, texts, strict=True)]
    path.write_bytes(lzma.compress("".join(parts).encode(), preset=shards.PRESET))


def build(sources: dict[str, Source], unpacked: Path, folder: Path, heldout: Path) -> dict[str, Any]:
    """Write the shards, the held-out text with its copyright notices, and the manifest; return the manifest."""
    (folder / "manifest.json").unlink(missing_ok=True)  # the manifest is written last; a folder without one is not a corpus
    tallies, documents = read_sources(sources, unpacked)
    parts = split(deduplicate(documents, tallies), HELDOUT_BYTES, CODE_BYTES, PROSE_BYTES)
    for document in parts.left_out:
        tallies[document.source].dropped["over_budget"] += 1
    for document in parts.heldout + parts.train:
        tallies[document.source].kept += 1
        tallies[document.source].kept_bytes += document.size
    for name, tally in tallies.items():
        tally.check(name)
    write_notices(parts.heldout, sources, unpacked, heldout.with_name(NOTICES))
    manifest = {
        "seed": SEED,
        "nearest": nearest(parts.heldout, parts.train),
        "heldout": write_heldout(parts.heldout, {name: source.licence for name, source in sources.items()}, heldout),
        "train": _size(parts.train),
        "shards": write_shards(parts.train, folder),
        "dropped": dict(sum((tally.dropped for tally in tallies.values()), Counter[str]()).most_common()),
        "sources": {name: msgspec.to_builtins(tally) for name, tally in tallies.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    return manifest


def check_compressed(manifest: dict[str, Any]) -> int:
    """Return the size of all shards in bytes. Raises ConfigError if they exceed MAX_COMPRESSED."""
    total = sum(shard["compressed_bytes"] for shard in manifest["shards"].values())
    if total > MAX_COMPRESSED:
        raise ConfigError(f"the shards have {total} bytes, over {MAX_COMPRESSED}: lower CODE_BYTES and PROSE_BYTES in {__name__}")
    return int(total)


def _size(documents: Sequence[Document]) -> dict[str, int]:
    code = sum(document.size for document in documents if document.is_code)
    total = sum(document.size for document in documents)
    return {"files": len(documents), "bytes": total, "code_bytes": code, "prose_bytes": total - code}


def main(work: Work = WORK, heldout: Annotated[Path, typer.Option(help="Where to write the held-out files.")] = HELDOUT) -> None:
    """Build the corpus from the packages that `python -m train.fetch` unpacked."""
    try:
        manifest = build(load_sources(), work / "unpacked", work / "corpus", heldout)
        compressed = check_compressed(manifest)
    except ConfigError as e:
        raise SystemExit(f"train.corpus: {e.message}") from e
    for part in ("train", "heldout"):
        size = manifest[part]
        typer.echo(f"{part}: {size['files']} files, {size['bytes']} bytes, {size['code_bytes'] / size['bytes']:.1%} code")
    typer.echo(f"compressed: {compressed} bytes in {SHARDS} shards; dropped: {manifest['dropped']}")


if __name__ == "__main__":
    typer.run(main)
