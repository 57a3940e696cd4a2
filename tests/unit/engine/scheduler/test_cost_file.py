"""Tests of cost files: what is written is read again, and everything else is refused by file, key, value and remedy."""

import json
from pathlib import Path

import msgspec
import pytest

from engine.config import BatchingConfig, EngineConfig, ModelLimits, SchedulerConfig, resolve
from engine.errors import ConfigError
from engine.scheduler.cost_file import CostFile, CostKey, load_costs, save_costs, seeded_cost
from engine.scheduler.limits import StepShape
from tests.unit.engine.scheduler.devices import H200, Device, chat_steps

KEY = CostKey("NVIDIA H200", "llama-8b", "bfloat16")
LIMITS = ModelLimits(max_model_len=1000, vocab_size=10, eos_token_ids=(), dtype="float32")
H200_FILE = Path(__file__).resolve().parents[4] / "loadtest" / "costs" / "h200-llama-8b-bf16.json"


@pytest.fixture
def path(tmp_path):
    save_costs(tmp_path / "costs.json", KEY, "a test", H200)
    return tmp_path / "costs.json"


def refusal(path, text: str | None = None) -> str:
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_costs(path, setting="batching.cost_file")
    assert caught.value.param == "batching.cost_file"
    assert str(path) in caught.value.message
    return caught.value.message


def test_a_file_is_read_as_it_was_written(path):
    assert load_costs(path, setting="x") == CostFile(KEY, "a test", H200)
    assert [file.name for file in path.parent.iterdir()] == ["costs.json"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(path, monkeypatch):
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.scheduler.cost_file.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_costs(path, KEY, "another", H200)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["costs.json"]


def test_what_was_learnt_can_be_saved_and_predicts_the_same(tmp_path):
    config = EngineConfig(model="m", scheduler=SchedulerConfig(max_step_tokens=8192))
    cost = seeded_cost(resolve(config, LIMITS, has_cuda=False), KEY)
    Device(H200).teach(cost, chat_steps(500))
    save_costs(tmp_path / "new.json", KEY, "learnt", cost.table)
    table = load_costs(tmp_path / "new.json", setting="x").table
    assert [table.predict(shape) for shape in chat_steps(50)] == [cost.predict(shape) for shape in chat_steps(50)]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 1, "version is 1, and this program reads version 2"),
        ("version", None, "version is None"),
        ("version", True, "version is True"),
        ("kv_token_seconds", -1e-9, "kv_token_seconds is -1e-09: it must be a number of seconds from 0 to 3600"),
        ("attention_pair_seconds", 1e308, "attention_pair_seconds is 1e+308: it must be a number of seconds from 0 to 3600"),
        ("attention_pair_seconds", "fast", "Expected `float`, got `str` - at `$.attention_pair_seconds`"),
        ("decode_seconds", [1, 2, 3, 4, -5], "decode_seconds[4] is -5.0: it must be a number of seconds"),
        ("decode_seconds", [1, 2, 1.5, 4, 5], "decode_seconds[2] is 1.5, less than 2.0 before it"),
        ("decode_seconds", [1, 2], "decode_rows has 5 entries, and decode_seconds has 2"),
        ("decode_rows", [1, 64, 64, 192, 256], "decode_rows[2] is 64: sizes must be at least 1 and ascend"),
        ("decode_rows", [0, 64, 65, 192, 256], "decode_rows[0] is 0"),
        ("step_tokens", [], "step_tokens is empty"),
        ("step_seconds", [5.0] * 9 + [4.0], "step_seconds[9] is 4.0, less than 5.0 before it"),
        ("decode_second", [], "unknown field `decode_second`"),
    ],
)
def test_wrong_content_is_refused_by_key_and_value(path, key, value, message):
    content = json.loads(path.read_text()) | {key: value}
    told = refusal(path, json.dumps(content))
    assert message in told
    assert "write the file again, or unset the setting" in told


def test_a_missing_key_is_named(path):
    content = json.loads(path.read_text())
    del content["step_seconds"]
    assert "missing required field `step_seconds`" in refusal(path, json.dumps(content))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_refused(path, number):
    refusal(path, path.read_text().replace("3.5e-8", number, 1))


def test_a_torn_file_is_refused(path):
    text = path.read_text()
    for end in (0, 1, len(text) // 2, len(text) - 3):
        assert "it is not a complete JSON document" in refusal(path, text[:end])
    assert "version is None" in refusal(path, "[]")


def test_a_file_of_brackets_in_brackets_is_refused(path):
    assert "it is not a complete JSON document" in refusal(path, "[" * 200_000)


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert "cannot be read (No such file or directory): name a cost file" in refusal(tmp_path / "none.json")
    assert "cannot be read (Is a directory)" in refusal(tmp_path)


def config_of(path) -> EngineConfig:
    config = EngineConfig(
        model="m", scheduler=SchedulerConfig(max_step_tokens=8192), batching=BatchingConfig(cost_file=str(path))
    )
    return resolve(config, LIMITS, has_cuda=False)


def test_an_engine_starts_from_the_file_of_its_device_model_and_precision(path):
    cost = seeded_cost(config_of(path), KEY)
    assert cost.trusted
    assert cost.predict(StepShape(64, 0, 0, 0)) == pytest.approx(4.4e-3)
    assert not seeded_cost(msgspec.structs.replace(config_of(path), batching=BatchingConfig()), KEY).trusted


@pytest.mark.parametrize("field", CostKey._fields)
def test_a_file_of_something_else_is_refused(path, field):
    with pytest.raises(ConfigError, match=f"{field} is '{getattr(KEY, field)}', but this engine's is 'other'"):
        seeded_cost(config_of(path), KEY._replace(**{field: "other"}))


def test_the_file_of_the_h200_says_what_was_measured_there():
    file = load_costs(H200_FILE, setting="x")
    assert file.key == KEY
    assert file.source.startswith("measured on 2026-12-01")
    predict = file.table.predict  # the seconds below are from docs/gpu.md, and the file was fitted to other steps
    assert predict(StepShape(1, 1100, 0, 0)) == pytest.approx(4.06e-3, rel=0.02)
    assert predict(StepShape(64, 64 * 256, 0, 0)) == pytest.approx(5.06e-3, rel=0.12)
    assert predict(StepShape(192, 192 * 700, 0, 0)) == pytest.approx(10.1e-3, rel=0.16)
    assert predict(StepShape.with_chunk(0, 0, 8192, 0)) == pytest.approx(8192 / 39_153, rel=0.08)
