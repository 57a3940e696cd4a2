from __future__ import annotations

import json

import numpy as np
import pytest

from train import shards, tokens
from train.shapes import BEGIN, END
from train.tokenizer import learn, write

TEXTS = [f"def f{i}(x):\n    return x + {i}\n" for i in range(40)]


@pytest.fixture
def work(tmp_path):
    """Write a corpus of two shards with its manifest, a held-out file and a tokenizer. Returns the folder."""
    names = ["train-00.jsonl.xz", "train-01.jsonl.xz"]
    for index, name in enumerate(names):
        rows = [{"source": "s", "path": str(i), "text": text} for i, text in enumerate(TEXTS[index::2])]
        shards.write(tmp_path / "corpus" / name, rows)
    shards.write(tmp_path / "heldout.jsonl.xz", [{"source": "s", "path": "h", "text": "def held(x):\n    pass  # é\n"}])
    (tmp_path / "corpus" / "manifest.json").write_text(json.dumps({"shards": dict.fromkeys(names)}))
    write(learn(TEXTS, vocab_size=300), tmp_path / "tokenizer")
    return tmp_path


def documents(stream, tokenizer):
    starts = np.flatnonzero(stream == BEGIN)
    parts = np.split(stream, starts[1:])
    assert all(part[0] == BEGIN and part[-1] == END for part in parts)
    return [tokenizer.decode(part[1:-1].tolist()) for part in parts]


def test_every_document_is_in_the_stream_once_and_shuffled(work):
    facts = tokens.write(work, work / "heldout.jsonl.xz", work / "tokenizer" / "tokenizer.json")
    tokenizer = tokens.Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    found = documents(np.fromfile(work / tokens.TRAIN, dtype=np.int16), tokenizer)
    assert sorted(found) == sorted(TEXTS)
    assert found != TEXTS[::2] + TEXTS[1::2]
    held = np.fromfile(work / tokens.HELDOUT, dtype=np.int16)
    assert documents(held, tokenizer) == ["def held(x):\n    pass  # é\n"]
    assert facts == json.loads((work / tokens.FACTS).read_text())
    assert (facts["documents"], facts["heldout_tokens"]) == (40, len(held))
    assert facts["heldout_bytes"] == len("def held(x):\n    pass  # é\n".encode())


def test_the_same_corpus_gives_the_same_stream(work):
    made = []
    for _ in range(2):
        tokens.write(work, work / "heldout.jsonl.xz", work / "tokenizer" / "tokenizer.json")
        made.append((work / tokens.TRAIN).read_bytes())
    assert made[0] == made[1]


def test_without_a_corpus_it_says_what_writes_one(tmp_path):
    with pytest.raises(SystemExit, match=r"manifest\.json: no such file; `python -m train\.corpus`"):
        shards.training_files(tmp_path)
