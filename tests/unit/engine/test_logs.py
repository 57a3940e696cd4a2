"""How a line reads, and what is kept out of the log."""

import json
import logging

import pytest

from engine import logs


@pytest.fixture
def restored():
    root, cython = logging.getLogger(), logging.getLogger("grpc._cython")
    before = root.level, root.handlers[:], cython.level
    yield
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    cython.setLevel(before[2])


def record(**extra):
    made = logging.LogRecord("tidegate", logging.INFO, "file", 1, "engine ready", None, None)
    vars(made).update(extra)
    return made


def test_a_line_for_people_quotes_what_has_no_clear_end():
    line = logs.HumanFormatter("engine 0").format(record(device="CPU, 2 threads", model="demo-v1", blocks=64, why="", said='"'))
    assert line.endswith('engine ready device="CPU, 2 threads" model=demo-v1 blocks=64 why="" said="\\""')


def test_a_line_for_machines_is_json():
    line = json.loads(logs.JsonFormatter("engine 0").format(record(device="CPU, 2 threads", blocks=64)))
    assert (line["message"], line["device"], line["blocks"]) == ("engine ready", "CPU, 2 threads", 64)


def test_grpcs_poll_by_poll_lines_are_kept_out(restored, monkeypatch):
    monkeypatch.setattr("sys.excepthook", None)
    logs.set_up("debug", "json", "api 0")
    assert not logging.getLogger("grpc._cython.cygrpc").isEnabledFor(logging.DEBUG)
    assert logging.getLogger("tidegate.worker").isEnabledFor(logging.DEBUG)
