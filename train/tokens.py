"""Turns the corpus into one stream of token ids: `python -m train.tokens`.

Documents are shuffled. Each document begins with <|begin|> and ends with <|end|>. The held-out files become a second stream,
which is used only for measurements.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer

from train import shards
from train.shapes import BEGIN, END

TRAIN, HELDOUT, FACTS = "train.bin", "heldout.bin", "tokens.json"
SEED = 2026
Ids = npt.NDArray[np.int16]  # ids are below 8192; torch can index with int16 on every device, but not with uint16


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> list[Ids]:
    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array([BEGIN, *e.ids, END], dtype=np.int16) for e in encoded]


def _encoded_shards(tokenizer: Tokenizer, files: list[Path]) -> Iterator[list[Ids]]:
    """Yield the token ids of each shard's documents. Threads encode the shards, since decompressing and tokenising both release
    the interpreter lock."""
    with ThreadPoolExecutor() as pool:
        yield from pool.map(lambda shard: encode(tokenizer, _texts(shard)), files)


def _texts(file: Path) -> list[str]:
    return [row["text"] for row in shards.read(file)]


def write(work: Path, heldout: Path, tokenizer_file: Path) -> dict[str, int]:
    """Write the training stream, the held-out stream and their manifest to `work`. The same corpus and tokenizer give the same
    bytes."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    files = shards.training_files(work / "corpus")
    documents: list[Ids] = []
    for part in track(_encoded_shards(tokenizer, files), "tokenising", total=len(files), console=Console(stderr=True)):
        documents += part
    random.Random(SEED).shuffle(documents)
    stream = np.concatenate(documents)
    texts = _texts(heldout)
    held = np.concatenate(encode(tokenizer, texts))
    stream.tofile(work / TRAIN)
    held.tofile(work / HELDOUT)
    facts = {
        "documents": len(documents),
        "tokens": len(stream),
        "heldout_tokens": len(held),
        "heldout_bytes": sum(len(text.encode()) for text in texts),
    }
    (work / FACTS).write_text(json.dumps(facts) + "\n")
    return facts


def main(work: Path = Path(".cache/train"), heldout: Path = Path("train/heldout.jsonl.xz")) -> None:
    """Tokenise the corpus in WORK/corpus with WORK/tokenizer/tokenizer.json."""
    facts = write(work, heldout, work / "tokenizer" / "tokenizer.json")
    typer.echo(json.dumps(facts))


if __name__ == "__main__":
    typer.run(main)
