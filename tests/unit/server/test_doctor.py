"""Tests the findings of `tidegate doctor`. The test supplies the answer that torch would give."""

import json
import shutil
import socket
from pathlib import Path

import pytest

from server import doctor
from server.findings import Finding, report
from server.settings import Settings
from tests.support.tiny_checkpoint import write_tiny_checkpoint

NO_CUDA = doctor.TorchAnswer(version="2.11", cuda=None, devices=[], problem=None)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def model(demo, tmp_path):
    """Return a copy of the demo checkpoint's folder, which a test may damage."""
    return Path(shutil.copytree(demo, tmp_path / "model"))


@pytest.fixture
def torch(monkeypatch):
    def answers(answer=NO_CUDA):
        monkeypatch.setattr(doctor, "_run_probe", lambda checkpoint: answer)

    answers()
    return answers


def findings(**settings):
    found = doctor.examine(Settings(**{"port": 0, "grpc_port": 0, "admin_port": 0, **settings}))
    return {finding.what: (finding.state, finding.text) for finding in found}


def missing(**settings):
    return {what: text for what, (state, text) in findings(**settings).items() if state == "missing"}


@pytest.mark.torch
def test_a_complete_model_is_ok(torch, model):
    found = findings(model=str(model))
    assert not missing(model=str(model))
    assert found["model"] == ("ok", f"DeepseekV3ForCausalLM, 4 layers, context 4096, at {model}")
    assert found["engine"][0] == "ok"


def test_an_unknown_architecture_is_reported(torch, model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    assert "architectures" in missing(model=str(model))["model"]


def test_keys_of_the_config_that_have_no_effect_are_a_note(torch, model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "my_dataset": "x"}))
    state, text = findings(model=str(model))["config.json"]
    assert state == "note"
    assert text.endswith("these keys have no effect here: my_dataset")


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_tokenizer_that_cannot_be_read_is_reported(torch, model, text):
    (model / "tokenizer.json").unlink()
    if text is not None:
        (model / "tokenizer.json").write_text(text)
    assert "tokenizer.json" in missing(model=str(model))["model"]


def test_a_missing_chat_template_is_a_note(torch, model):
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    assert findings(model=str(model))["chat template"] == (
        "note",
        "the model has no chat template: /v1/chat/completions refuses what needs it",
    )


def test_a_chat_template_that_does_not_parse_is_a_note(torch, model):
    (model / "chat_template.jinja").write_text("{% nonsense %}")
    level, what = findings(model=str(model))["chat template"]
    assert level == "note"
    assert what.startswith("chat_template.jinja: the chat template does not parse: line 1")


def test_what_generation_config_asks_for_in_vain_is_a_note(torch, model):
    (model / "generation_config.json").write_text('{"no_repeat_ngram_size": 3, "top_k": 5}')
    assert findings(model=str(model))["sampling"][0] == "note"
    assert "no_repeat_ngram_size" in findings(model=str(model))["sampling"][1]
    (model / "generation_config.json").write_text('{"top_k": "many"}')
    assert "generation_config.json: top_k is" in missing(model=str(model))["model"]
    assert "sampling" not in findings(model=str(model), generation_config="off")


def test_settings_that_the_engine_refuses_are_reported_by_their_own_names(torch, model):
    text = missing(model=str(model), max_model_len=5000)["engine"]
    assert text == "max_model_len is 5000, but the model was made for 4096 tokens at most"
    torch(doctor.TorchAnswer("2.11", None, [], "cache.memory_fraction leaves 3 bytes"))
    assert missing(model=str(model))["engine"] == "memory_fraction leaves 3 bytes"


def test_the_fake_runner_needs_no_weights(torch, model):
    (model / "model.safetensors").unlink()
    assert findings(model=str(model), runner="fake")["engine"][0] == "note"
    assert doctor._question(doctor._model(Settings(model=str(model), runner="fake"))) == ""


def test_more_cache_than_memory_is_a_note(torch, model):
    assert findings(model=str(model), host_bytes=1 << 60)["memory"][0] == "note"


@pytest.mark.torch
def test_a_port_in_use_is_reported(torch, model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = missing(model=str(model), port=port)
    assert found == {"HTTP port": f"127.0.0.1:{port} is in use by another program, or by a Tidegate that runs already"}


def test_packages_that_no_code_uses_are_not_listed(torch, model):
    assert not findings(model=str(model)).keys() & {"flashinfer", "onnxruntime", "tensorrt", "opentelemetry.sdk"}


def test_a_pipe_gets_one_line_for_each_finding_without_padding(capsys):
    long = "word " * 60 + "[end]"
    code = report([Finding("model", "missing", long), Finding("disk", "note", "some")])
    assert code == 1
    assert capsys.readouterr().out == f"MISSING model: {long}\n- disk: some\n"
