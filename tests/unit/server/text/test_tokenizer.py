import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import CheckpointError
from server.text.conversation import Conversation
from server.text.tokenizer import Tokenizer
from tests.support.tiny_checkpoint import BOS, write_tiny_checkpoint
from tests.unit.server.text.tokenizers_for_tests import byte_level, llama2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def copy(folder, tmp_path):
    """Make a folder with copies of tokenizer.json and tokenizer_config.json, for tests that change them."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    return tmp_path


def change(folder, **fields):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_folder_gives_the_tokenizer_and_its_chat_template(folder):
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.vocab_size == 512
    assert tokenizer.encode("Hello")[0] == BOS
    assert tokenizer.encode("Hello", add_special_tokens=False)[0] != BOS
    template = tokenizer.chat.find(None, "tiny")
    assert template.render(Conversation(messages=[{"role": "user", "content": "x"}])).startswith("<|begin|><|user|>x")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_encoded_text_decodes_to_itself(text):
    for special in ("<|begin|>", "<|end|>", "<|user|>", "<|system|>", "<|assistant|>"):
        text = text.replace(special, "")
    tokenizer = byte_level()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_error_names_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"a":' * 100_000 + "1" + "}" * 100_000], ids=["cut", "nested"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_an_error_names_a_file_that_cannot_be_read(copy, name, content):
    (copy / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        Tokenizer.from_folder(copy)


def test_the_config_decides_whether_a_begin_token_is_added(copy):
    change(copy, add_bos_token=False)
    tokenizer = Tokenizer.from_folder(copy)
    assert BOS not in tokenizer.encode("Hello")
    assert tokenizer.encode("<|begin|>Hello").count(BOS) == 1
    parts = json.loads((copy / "tokenizer.json").read_text())
    parts["post_processor"] = None
    (copy / "tokenizer.json").write_text(json.dumps(parts))
    change(copy, add_bos_token=True, bos_token={"content": "<|begin|>"})
    assert Tokenizer.from_folder(copy).encode("Hello").count(BOS) == 1


def test_truncation_in_the_file_is_ignored(copy):
    parts = json.loads((copy / "tokenizer.json").read_text())
    parts["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (copy / "tokenizer.json").write_text(json.dumps(parts))
    assert len(Tokenizer.from_folder(copy).encode("one two three four five six seven")) > 3


def test_the_text_and_bytes_of_single_tokens():
    tokenizer = byte_level()
    assert tokenizer.token_text(BOS) == "<|begin|>"
    assert tokenizer.token_text(100_000) == ""
    pieces = tokenizer.encode("é🌊", add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(id) for id in pieces) == "é🌊".encode()
    assert tokenizer.token_text(pieces[-1]) == "\ufffd"
    sentencepiece = llama2()
    assert sentencepiece.token_bytes(sentencepiece._tokenizer.token_to_id("<0xF0>")) == b"\xf0"
    assert sentencepiece.token_text(sentencepiece.encode("the")[0]).startswith(" ")
