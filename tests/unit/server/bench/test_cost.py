"""Tests of `tidegate bench cost`: the fit finds the costs of a known device, and what is too far off is not written."""

import json
from functools import partial

import msgspec
import pytest
from rich.console import Console

from engine.config import BatchingConfig, CacheConfig, EngineConfig, FakeConfig, ModelLimits, SchedulerConfig
from engine.core import build_core
from engine.errors import ConfigError
from engine.fake import build_fake
from engine.fake_device import SimulatedDevice, SimulatedTime
from engine.scheduler.cost_file import CostKey, load_costs, save_costs
from engine.scheduler.cost_table import CostTable
from engine.scheduler.limits import StepShape
from server.bench import cost
from server.settings import Settings
from tests.support.tiny_checkpoint import write_tiny_checkpoint

LIMITS = ModelLimits(max_model_len=4096, vocab_size=500, eos_token_ids=(3,), dtype="float32")
TABLE = CostTable([4, 8, 32], [4e-3, 5e-3, 6e-3], [16, 64, 256], [8e-3, 10e-3, 40e-3], 1e-7, 1e-8, 1e-8)


def built(tmp_path, *, noise: float = 0.0):
    """Build a simulated device whose steps cost what TABLE says."""
    save_costs(tmp_path / "true.json", CostKey("a device", "a model", "float32"), "a test", TABLE)
    time = SimulatedTime()
    config = EngineConfig(
        model="none",
        runner="fake",
        overlap=False,
        cache=CacheConfig(block_size=16, num_blocks=4000),
        scheduler=SchedulerConfig(max_num_seqs=32, max_step_tokens=256),
        fake=FakeConfig(cost_file=str(tmp_path / "true.json")),
    )
    return build_fake(config, LIMITS, make_device=partial(SimulatedDevice, clock=time.clock, sleep=time.sleep, noise=noise))


def test_the_costs_of_a_known_device_are_found(tmp_path):
    device = built(tmp_path)
    found = cost.measure(device, 2, Console(quiet=True))
    fitted = cost.fit(device.config.scheduler, found)
    assert fitted.error < 0.02
    assert fitted.held_out == pytest.approx(len(found) / 5, abs=1)
    for shape in (StepShape(1, 300, 0, 0), StepShape(8, 2000, 0, 0), StepShape(32, 8000, 0, 0), StepShape(20, 4000, 100, 50_000)):
        assert fitted.table.predict(shape) == pytest.approx(TABLE.predict(shape), rel=0.1)


def test_the_steps_have_all_numbers_of_rows_and_chunks_of_all_sizes(tmp_path):
    shapes = [shape for shape, _ in cost.measure(built(tmp_path), 1, Console(quiet=True))]
    assert {shape.decodes for shape in shapes if not shape.prompt_tokens} == {1, 2, 4, 8, 16, 24, 32}
    sizes = {shape.prompt_tokens for shape in shapes}
    assert {16, 24, 32, 48, 64, 96, 128} <= sizes
    assert max(shape.decodes + shape.prompt_tokens for shape in shapes) == 256
    assert max(shape.attention for shape in shapes) > 100 * 800  # chunks behind a context


def test_costs_that_vary_are_off_by_as_much(tmp_path):
    device = built(tmp_path, noise=0.6)
    assert cost.fit(device.config.scheduler, cost.measure(device, 2, Console(quiet=True))).error > cost.MOST_ERROR


def test_a_device_that_computes_nothing_has_no_costs(tmp_path):
    folder = write_tiny_checkpoint(tmp_path / "model")
    settings = Settings(model=str(folder), runner="fake", max_num_seqs=4, max_step_tokens=32)
    with pytest.raises(ConfigError, match="the steps took no time that could be measured"):
        cost.run(settings, out=tmp_path / "costs.json")
    assert not (tmp_path / "costs.json").exists()


@pytest.mark.torch
def test_a_real_model_is_measured_and_its_engine_takes_the_file(tmp_path, capsys, monkeypatch):
    folder = write_tiny_checkpoint(tmp_path / "model")
    out = tmp_path / "costs.json"
    settings = Settings(model=str(folder), device="cpu", max_num_seqs=4, max_step_tokens=32)
    monkeypatch.setattr(cost, "MOST_ERROR", float("inf"))  # how steadily this machine computes is not what is tested
    line = cost.run(settings, out=out, rounds=1)
    assert json.loads(capsys.readouterr().out)["file"] == str(out)
    file = load_costs(out, setting="cost_file")
    assert (file.key.model, file.key.precision) == ("model", "float32")
    assert f"{line.steps} steps" in file.source
    assert file.table.decode_rows == [1, 2, 4]
    batching = BatchingConfig(policy="model", cost_file=str(out))
    core = build_core(msgspec.structs.replace(settings.engine_config(), batching=batching))
    assert core.stats().batching == "model"
    core.close()
    assert all(seconds > 0 for seconds in file.table.decode_seconds + file.table.step_seconds)


@pytest.mark.torch
def test_costs_that_are_too_far_off_are_not_written(tmp_path, monkeypatch):
    folder = write_tiny_checkpoint(tmp_path / "model")
    monkeypatch.setattr(cost, "MOST_ERROR", -1.0)
    settings = Settings(model=str(folder), device="cpu", max_num_seqs=4, max_step_tokens=32)
    with pytest.raises(ConfigError, match=r"out is not written: .* off by \d+% at the median"):
        cost.run(settings, out=tmp_path / "costs.json", rounds=1)
    assert not (tmp_path / "costs.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rounds": 0}, "rounds is 0: it must be at least 1"), ({"out": "none/costs.json"}, "there is no folder .*none'")],
)
def test_wrong_arguments_are_named_before_anything_is_measured(tmp_path, changes, message):
    out = tmp_path / changes.pop("out", "costs.json")
    with pytest.raises(ConfigError, match=message):
        cost.run(Settings(model=str(tmp_path)), out=out, **changes)
