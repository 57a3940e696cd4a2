"""Tests of learnt costs: what an engine learns is read by the next one, and files that are no use are ignored by name."""

import logging
import os
import threading

import pytest

from engine.config import BatchingConfig, EngineConfig, FakeConfig, ModelLimits, SchedulerConfig
from engine.core import Core
from engine.errors import ConfigError
from engine.fake import build_fake
from engine.fake_device import SimulatedDevice, SimulatedTime
from engine.messages import Submit, pack_tokens
from engine.request import SamplingParams
from engine.scheduler.cost_file import CostKey, load_costs, save_costs
from engine.scheduler.cost_folder import KEEP_SECONDS, CostKeeper, LearntCosts, check_folder
from engine.scheduler.limits import StepShape
from engine.scheduler.step_cost import StepCost
from tests.unit.engine.scheduler.devices import H200, Device, chat_steps

KEY = CostKey("NVIDIA H200", "llama-8b", "bfloat16")
LIMITS = ModelLimits(max_model_len=1000, vocab_size=1000, eos_token_ids=(), dtype="float32")


def learnt_cost(num: int = 500, most_rows: int = 200) -> StepCost:
    cost = StepCost.of_size(256, 8192)
    Device(H200, outliers=0.0).teach(cost, chat_steps(num, most_rows=most_rows))
    return cost


def test_what_was_learnt_is_kept_and_predicts_the_same(tmp_path):
    cost, file = learnt_cost(), LearntCosts(str(tmp_path), KEY)
    assert file.read() is None
    CostKeeper(cost, file).close()
    again = StepCost.of_size(256, 8192, file.read())
    assert again.trusted
    shapes = [shape for shape in chat_steps(200, seed=8) if cost.knows(shape)]
    assert len(shapes) > 100
    assert [again.predict(s) for s in shapes] == pytest.approx([cost.predict(s) for s in shapes], rel=0.03)


def test_sizes_that_were_never_measured_are_not_kept(tmp_path):
    """Their predictions are bounds. Taken for measurements, they would keep the limits of the next engine from growing."""
    cost, file = learnt_cost(most_rows=40), LearntCosts(str(tmp_path), KEY)
    CostKeeper(cost, file).close()
    table = file.read()
    assert 40 <= table.decode_rows[-1] <= 64
    again = StepCost.of_size(256, 8192, table)
    assert again.knows(StepShape(40, 0, 0, 0))
    assert not again.knows(StepShape(256, 0, 0, 0))
    assert again.predict(StepShape(256, 0, 0, 0)) < 4 * H200.predict(StepShape(256, 0, 0, 0))


@pytest.mark.parametrize("num", [0, 20])
def test_too_few_steps_are_not_kept(tmp_path, num):
    CostKeeper(learnt_cost(num), LearntCosts(str(tmp_path), KEY)).close()
    assert list(tmp_path.iterdir()) == []


def test_costs_that_were_only_read_are_not_written_again(tmp_path):
    file = LearntCosts(str(tmp_path), KEY)
    CostKeeper(learnt_cost(), file).close()
    file.path.touch()
    os.utime(file.path, (1000, 1000))
    CostKeeper(StepCost.of_size(256, 8192, file.read()), file).close()
    assert file.path.stat().st_mtime == 1000


def test_costs_that_are_wrong_now_are_not_kept(tmp_path):
    cost = learnt_cost()
    for shape in chat_steps(40):
        cost.observe(shape, 5 * H200.predict(shape))
    CostKeeper(cost, LearntCosts(str(tmp_path), KEY)).close()
    assert list(tmp_path.iterdir()) == []


def test_each_device_model_and_precision_has_a_file_of_its_own(tmp_path):
    keys = [KEY, KEY._replace(device="NVIDIA  H200"), KEY._replace(model="llama/8b"), KEY._replace(precision="float16")]
    names = {LearntCosts(str(tmp_path), key).path.name for key in keys}
    assert len(names) == 4
    assert any(name.startswith("NVIDIA-H200-llama-8b-bfloat16-") for name in names)
    odd = LearntCosts(str(tmp_path), CostKey("../../etc", "x" * 300, "bf\n16")).path
    assert odd.parent == tmp_path
    assert len(odd.name) < 150


@pytest.mark.parametrize("content", ["", "{", '{"version": 9}', "[]", "\x00\x01"])
def test_a_torn_file_is_ignored_by_name_and_replaced(tmp_path, caplog, content):
    file = LearntCosts(str(tmp_path), KEY)
    file.path.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert file.read() is None
    (record,) = caplog.records
    assert record.message == "learnt step costs are ignored"
    assert record.path == str(file.path)
    assert str(file.path) in record.why
    CostKeeper(learnt_cost(), file).close()
    assert file.read() is not None


def test_a_file_of_something_else_is_ignored_by_name(tmp_path, caplog):
    file = LearntCosts(str(tmp_path), KEY)
    save_costs(file.path, KEY._replace(model="llama-70b"), "copied", H200)
    with caplog.at_level(logging.WARNING):
        assert file.read() is None
    (record,) = caplog.records
    assert "llama-70b" in record.why
    assert "llama-8b" in record.why


def test_a_folder_is_made_and_one_that_cannot_be_is_refused(tmp_path):
    check_folder(str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        with pytest.raises(ConfigError, match=r"cost_folder is '.*file.*cannot be made") as caught:
            check_folder(str(tmp_path / name), "cost_folder")
        assert caught.value.param == "cost_folder"


def test_a_full_disk_is_reported_and_stops_nothing(tmp_path, caplog, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.scheduler.cost_file.os.fsync", full)
    file = LearntCosts(str(tmp_path), KEY)
    with caplog.at_level(logging.WARNING):
        CostKeeper(learnt_cost(), file).close()
    assert [(record.message, record.why) for record in caplog.records] == [
        ("learnt step costs cannot be written", "No space left on device")
    ]
    assert list(tmp_path.iterdir()) == []


def test_costs_are_written_every_few_minutes_by_one_thread_at_a_time(tmp_path):
    time, allowed, tables = SimulatedTime(), threading.Event(), []

    class SlowDisk(LearntCosts):
        def write(self, table):
            assert allowed.wait(20)
            tables.append(table)

    keeper = CostKeeper(learnt_cost(), SlowDisk(str(tmp_path), KEY), time.clock)
    keeper.keep()
    for _ in range(3):
        time.now += KEEP_SECONDS
        keeper.keep()  # the first of these is still being written
    allowed.set()
    keeper.close()
    assert len(tables) == 2  # one in time, and one at the end


def core_of(folder, device: SimulatedTime, **changes) -> Core:
    config = EngineConfig(
        model="/models/tiny",
        runner="fake",
        scheduler=SchedulerConfig(max_num_seqs=16),
        batching=BatchingConfig(cost_folder=str(folder), **changes),
        fake=FakeConfig(step_ms=20.0),
    )
    built = build_fake(config, LIMITS, make_device=lambda *given: SimulatedDevice(*given, device.clock, device.sleep))
    return Core(built, clock=device.clock)


def serve(core: Core, num: int) -> None:
    for number in range(num):
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        core.submit(Submit(request_id=f"r{number}", prompt=pack_tokens([number, 5, 6]), params=params, seed=0))
        while core.has_work:
            core.step()


def test_an_engine_that_stops_leaves_its_costs_to_the_next_one(tmp_path):
    time = SimulatedTime()
    first = core_of(tmp_path, time)
    assert first.stats().batching == "aimd"
    serve(first, 100)
    first.keep_costs()
    assert list(tmp_path.iterdir()) == []  # it is not time yet
    first.close()
    (path,) = tmp_path.iterdir()
    assert load_costs(path, setting="x").key == CostKey("fake device", "tiny", "float32")
    second = core_of(tmp_path, time)
    assert second.stats().batching == "model"


def test_the_file_of_the_operator_goes_first_and_is_not_written(tmp_path):
    time = SimulatedTime()
    operators = tmp_path / "own.json"
    save_costs(operators, CostKey("fake device", "tiny", "float32"), "the operator's", H200)
    before = operators.read_bytes()
    core = core_of(tmp_path / "learnt", time, policy="model", cost_file=str(operators))
    assert core.stats().batching == "model"
    serve(core, 200)
    core.close()
    assert operators.read_bytes() == before
    (path,) = (tmp_path / "learnt").iterdir()
    assert load_costs(path, setting="x").table.decode_seconds[0] == pytest.approx(0.02, rel=0.05)
