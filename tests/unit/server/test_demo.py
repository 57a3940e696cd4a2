import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jinja2.sandbox
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from engine.errors import ConfigError
from server import demo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return demo.ensure_demo_checkpoint(tmp_path_factory.mktemp("cache"))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_is_whole_says_what_it_is_and_leaves_nothing_beside(folder):
    assert sorted(contents(folder)) == sorted(demo.FILES)
    assert "random" in (folder / "README.md").read_text()
    assert "random" in demo.NOTICE
    assert [p.name for p in folder.parent.iterdir()] == [demo.NAME]


def test_the_same_bytes_every_time_and_within_three_seconds(folder, tmp_path):
    started = time.monotonic()
    again = demo.ensure_demo_checkpoint(tmp_path)
    assert time.monotonic() - started < 3
    assert contents(again) == contents(folder)


def test_a_second_start_writes_nothing(folder):
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert demo.ensure_demo_checkpoint(folder.parent) == folder
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_starts_at_once_agree(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(demo.ensure_demo_checkpoint, [tmp_path] * 4))
    assert set(folders) == {tmp_path / demo.NAME}
    assert [p.name for p in tmp_path.iterdir()] == [demo.NAME]
    assert sorted(contents(folders[0])) == sorted(demo.FILES)


def test_a_folder_that_lost_a_file_is_written_anew(folder, tmp_path):
    mine = demo.ensure_demo_checkpoint(tmp_path)
    (mine / "tokenizer.json").unlink()
    assert contents(demo.ensure_demo_checkpoint(tmp_path)) == contents(folder)
    assert [p.name for p in tmp_path.iterdir()] == [demo.NAME]


def test_a_crash_half_way_leaves_no_folder(tmp_path, monkeypatch):
    def full_disk(path, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_write", full_disk)
        with pytest.raises(ConfigError, match="No space left on device") as caught:
            demo.ensure_demo_checkpoint(tmp_path)
    assert caught.value.param == "model"
    assert list(tmp_path.iterdir()) == []
    assert demo.ensure_demo_checkpoint(tmp_path).is_dir()


def test_it_goes_under_xdg_cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.ensure_demo_checkpoint() == tmp_path / "tidegate" / demo.NAME
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert demo.ensure_demo_checkpoint() == tmp_path / "home" / ".cache" / "tidegate" / demo.NAME


def test_config_and_weights_agree(folder):
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["max_position_embeddings"] == 4096
    assert tensors["model.embed_tokens.weight"].shape == (config["vocab_size"], config["hidden_size"])
    assert 1e6 < sum(tensor.size for tensor in tensors.values()) < 4e6
    assert "model.layers.0.mlp.gate_proj.weight" in tensors
    assert "model.layers.1.mlp.experts.15.down_proj.weight" in tensors
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].std() > 0


@pytest.mark.parametrize("text", ["Hello, world", "naïve Ω 你好 🙂", "\ttabs\n\nlines  spaces ", "\x00\x7f", ""])
def test_every_text_comes_back(folder, text):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(text).ids
    assert ids[0] == demo.BOS
    assert tokenizer.decode(ids) == text


def test_tokenizer_fills_the_vocabulary_and_merges_words(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == demo.CONFIG["vocab_size"]
    assert [tokenizer.token_to_id(token) for token in demo.SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert len(tokenizer.encode("What is the capital of France?", add_special_tokens=False).ids) < 15


def test_chat_template(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(config["chat_template"])
    text = template.render(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Bye"},
        ],
        add_generation_prompt=True,
        bos_token=config["bos_token"],
        eos_token=config["eos_token"],
    )
    assert text == "<|begin|><|system|>Be brief.<|user|>Hi<|assistant|>Hello<|end|><|user|>Bye<|assistant|>"


def test_it_needs_no_torch(tmp_path):
    code = "import sys; from server.demo import ensure_demo_checkpoint as e; e(); assert 'torch' not in sys.modules"
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd=Path(__file__).parents[3])
