from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from server.bundled import FOLDER
from train import shards
from train.shapes import BEGIN, VOCAB_SIZE
from train.tokenizer import SPECIAL_TOKENS, learn, sample, write

TEXT = "def walk(self, path):\n    for name in os.listdir(path):\n        if not name:\n            return None  # 2026\n"


@pytest.fixture(scope="module")
def shipped():
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@given(st.text())
def test_every_text_comes_back(text):
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    if not any(token in text for token in SPECIAL_TOKENS):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    "text", ["", "\t\ttabs\r\n\n  x ", "naïve Ω 你好 🙂\x00\x7f", "a  b   c", "1234567", "x=[1,2]\n\n\n\n  y"]
)
def test_odd_texts_come_back(shipped, text):
    ids = shipped.encode(text).ids
    assert ids[0] == BEGIN
    assert shipped.decode(ids) == text


def test_the_shipped_one_has_the_vocabulary_and_the_special_tokens_first(shipped):
    assert shipped.get_vocab_size() == VOCAB_SIZE
    assert [shipped.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]


def test_code_is_cut_at_its_joints(shipped):
    pieces = [shipped.decode([i]) for i in shipped.encode(TEXT).ids[1:]]
    assert "".join(pieces) == TEXT
    assert "\n        " in pieces
    assert "(self" in pieces
    assert ".list" in pieces
    assert {"202", "6"} <= set(pieces)
    assert len(pieces) < 35


def test_learning_fills_the_vocabulary(tmp_path):
    tokenizer = learn([TEXT * 3, "while tide:\n    gate.open()\n" * 9], vocab_size=300)
    assert tokenizer.get_vocab_size() == 300
    write(tokenizer, tmp_path)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXT).ids == tokenizer.encode(TEXT).ids


def test_a_sample_is_the_same_share_of_each_shard(tmp_path):
    for i in range(3):
        texts = [f"{i} {j} {'x' * 94}" for j in range(50)]
        shards.write(tmp_path / f"train-0{i}.jsonl.xz", [{"source": "s", "path": str(j), "text": t} for j, t in enumerate(texts)])
    files = sorted(tmp_path.glob("*.xz"))
    taken = list(sample(files, 3000))
    # Each shard's share is 1,000 bytes. A text has 98 or 99 bytes, so 11 texts are needed to reach them.
    assert [sum(text[0] == str(i) for text in taken) for i in range(3)] == [11, 11, 11]
    assert taken == list(sample(files, 3000))
