"""Tests the processes that send a load: a death and a load that cannot start are reported, a stop is heard before the start."""

import os
import signal
import time

import pytest

from loadtest.measure import measure
from loadtest.process import LoadProcess, Start
from loadtest.spec import LoadError, Step, Target
from tests.unit.loadtest.samples import load

TARGET = Target("http://127.0.0.1:1", "generate", model="m", vocab=500)


@pytest.fixture
def process():
    made = LoadProcess(Start(load(concurrency=1), TARGET, 0, 1))
    yield made
    made.close()


def test_a_process_that_dies_is_reported(process):
    assert process.read().ready
    process.go(time.perf_counter())
    os.kill(process.pid, signal.SIGKILL)
    reports = [process.read()]
    while not reports[-1].done:
        reports.append(process.read())
    assert reports[-1].problem == "a process of the load test ended with code -9"


def test_a_process_can_be_stopped_before_it_starts(process):
    assert process.read().ready
    process.stop()
    report = process.read()
    assert (report.done, report.problem, report.records) == (True, "", [])


def test_a_load_that_cannot_start_is_refused_with_the_process_reason():
    empty = load(steps=(Step(0.001, 0.001, 0.001),))
    with pytest.raises(LoadError, match="no request arrives"):
        measure(empty, TARGET, procs=1, metrics=None, watch=lambda state: None)


def test_every_request_of_an_unreachable_server_fails_once():
    states = []
    found = measure(load(concurrency=4, requests=20), TARGET, procs=2, metrics=None, watch=states.append)
    assert sorted(r.index for r in found.records) == list(range(20))
    assert {(r.outcome, r.status) for r in found.records} == {("failed", "no connection")}
    assert states[-1].sent == 20
    assert (found.problem, found.interrupted, len(found.cpu_shares)) == ("", False, 2)
