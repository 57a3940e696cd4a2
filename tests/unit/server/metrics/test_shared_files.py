"""Tests of the metrics that several processes share in files, and keep in memory if the files cannot be written."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from prometheus_client import multiprocess
from prometheus_client.mmap_dict import MmapedDict

from server.metrics import supervisor
from server.metrics.number_file import RESERVED_BYTES, NumberFile
from tests.support.small_disk import fill, small_disk
from tests.unit.server.metrics.test_registry import conserved, parsed, total

WORKER = """
import json, os, resource, sys
from engine import logs
from server.engines.base import EngineHealth
from server.metrics.registry import Metrics

if "FILE_BYTES" in os.environ:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["FILE_BYTES"]),) * 2)
logs.set_up("info", "json", "api 0")
metrics = Metrics("m", lambda: EngineHealth(ready=True))

def serve():
    done, left = metrics.begin("http", "standard"), metrics.begin("grpc", "batch")
    for meter in (done, left):
        meter.prompt(5, 0)
        meter.first_token(meter._began, queue_seconds=0.0)
        meter.tokens(0, 1, 1.0); meter.tokens(0, 1, 1.5)
    done.finished("stop")

def many_errors():
    for i in range(2000):
        metrics.begin("http", "standard").failed(f"code_{i}")

for line in sys.stdin:
    {"serve": serve, "many_errors": many_errors, "scrape": lambda: None, "crash": lambda: os._exit(9)}[line.strip()]()
    print(json.dumps(metrics.render()[0].decode()), flush=True)
"""
DIED = "import sys; from server.metrics.supervisor import worker_died; worker_died(int(sys.argv[1]))"


class Worker:
    """Runs a process with its own metrics in `folder`. The test tells it what to count."""

    def __init__(self, folder, **variables):
        self.env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder), **variables}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen([sys.executable, "-c", WORKER], env=self.env, text=True, **pipes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def do(self, act):
        """Have the process run `act`, and return the samples of a scrape of this process after it."""
        self.process.stdin.write(act + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the worker died: {self.process.wait()}\n{self.process.stderr.read()}"
        return parsed(json.loads(line))

    def end(self):
        """Let the process end by itself, and return its log lines as dicts."""
        out = self.process.communicate(timeout=30)
        assert self.process.returncode == 0
        return [json.loads(line) for line in out[1].splitlines()]

    def crash(self):
        self.process.stdin.write("crash\n")
        self.process.stdin.flush()
        assert self.process.wait(30) == 9
        subprocess.run([sys.executable, "-c", DIED, str(self.process.pid)], env=self.env, check=True)


def test_several_workers_are_added_up_and_a_dead_one_keeps_the_law(tmp_path):
    with Worker(tmp_path) as one, Worker(tmp_path) as two, Worker(tmp_path) as other:
        one.do("serve")
        found = two.do("serve")
        assert found == other.do("scrape") == one.do("scrape")
        assert conserved(found)
        assert total(found, "tidegate_requests_started_total") == 4
        assert total(found, "tidegate_requests_running") == 2
        assert found["vllm:prompt_tokens_total", ()] == 20
        one.crash()
        two.crash()
        found = other.do("scrape")
    assert conserved(found)
    assert total(found, "tidegate_requests_running") == 0
    assert found["tidegate_requests_failed_total", (("code", "worker_died"), ("transport", "grpc"))] == 2
    assert total(found, "tidegate_output_tokens_total") == 8
    assert found["tidegate_inter_token_latency_seconds_bucket", (("le", "0.5"),)] == 4


SUPERVISOR = """
from server.metrics.supervisor import SupervisorDrops
drops = SupervisorDrops()
drops.add(3)
drops.add(1)
"""


def test_the_supervisors_dropped_log_lines_are_shown_by_the_workers(tmp_path):
    with Worker(tmp_path) as worker:
        subprocess.run([sys.executable, "-c", SUPERVISOR], env=worker.env, check=True)
        found = worker.do("scrape")
    assert found["tidegate_log_lines_dropped_total", (("process", "supervisor"),)] == 4


def test_a_supervisor_that_cannot_write_files_goes_on(tmp_path):
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "deleted")}
    subprocess.run([sys.executable, "-c", SUPERVISOR], env=env, check=True)


def full_disk(tmp_path):
    with small_disk(tmp_path / "small") as folder:
        fill(folder)
        yield folder, {}


def no_large_file(tmp_path):
    """Yield a folder, and a variable that limits the size of files in the process. A write over it fails with EFBIG."""
    yield tmp_path, {"FILE_BYTES": "4096"}


def deleted_folder(tmp_path):
    yield tmp_path / "deleted", {}


@pytest.fixture(params=[full_disk, no_large_file, deleted_folder], ids=lambda way: way.__name__)
def unwritable(request, tmp_path):
    """Yield a folder and environment variables with which a process cannot write its metric files."""
    yield from request.param(tmp_path)


def test_a_worker_that_cannot_write_files_counts_in_memory_and_says_so(unwritable):
    folder, variables = unwritable
    with Worker(folder, **variables) as worker:
        for rounds in (1, 2, 3):
            found = worker.do("serve")
            assert conserved(found)
            assert total(found, "tidegate_requests_started_total") == 2 * rounds
            assert total(found, "tidegate_output_tokens_total") == 4 * rounds
        (line,) = worker.end()
    assert str(folder) in line["message"]
    assert "set TMPDIR" in line["message"]


def test_a_disk_that_fills_up_while_serving_ends_no_worker(tmp_path):
    with small_disk(tmp_path / "small") as folder, Worker(folder) as one, Worker(folder) as other:
        one.do("serve")
        other.do("serve")
        fill(folder)
        found = one.do("serve")  # these metrics fit into the space that was reserved at the start
        assert (
            total(found, "tidegate_requests_started_total") == total(other.do("scrape"), "tidegate_requests_started_total") == 6
        )
        found = one.do("many_errors")  # these metrics need more space than was reserved
        assert conserved(found)
        assert total(found, "tidegate_requests_started_total") == 2006
        found = other.do("scrape")  # the first worker's metrics are only in its own memory now
        assert conserved(found)
        assert total(found, "tidegate_requests_started_total") == 2
        (line,) = one.end()
    assert "No space left on device" in line["message"]


def test_a_folder_that_is_deleted_while_serving_keeps_the_workers_own_metrics(tmp_path):
    folder = tmp_path / "metrics"
    folder.mkdir()
    with Worker(folder) as worker:
        worker.do("serve")
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        found = worker.do("serve")
        assert conserved(found)
        assert total(found, "tidegate_requests_started_total") == 4


def test_all_metrics_of_a_worker_fit_into_the_reserved_space(tmp_path):
    with Worker(tmp_path) as worker:
        worker.do("serve")
        assert {file.stat().st_size for file in tmp_path.iterdir()} == {RESERVED_BYTES}


def test_a_file_is_continued_by_a_process_with_the_same_id(tmp_path):
    """In a container, a new worker may get the process id of a dead one. It then continues the dead worker's file."""
    file = NumberFile(tmp_path / "counter_1.db")
    keys = [json.dumps(["m", "m_total", {"label": "x" * i}, "help"]) for i in range(40)]
    for i, key in enumerate(keys):
        file.set(file.position(key), float(i))
    file.publish()
    file.close()
    again = NumberFile(tmp_path / "counter_1.db")
    assert [again.get(again.position(key)) for key in keys] == [float(i) for i in range(40)]
    again.set(again.position(keys[3]), 50.0)
    again.set(again.position("new"), 1.0)
    again.publish()
    again.close()
    last = NumberFile(tmp_path / "counter_1.db")
    assert [last.get(last.position(key)) for key in (keys[3], keys[4], "new")] == [50.0, 4.0, 1.0]
    last.close()


MOMENTS = {
    "before its files are read": (MmapedDict, "read_all_values_from_file"),
    "before its gauges are removed": (multiprocess.os, "remove"),
    "before its requests are counted": (supervisor, "NumberFile"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_folder_that_is_deleted_while_a_dead_worker_is_counted_does_not_end_the_supervisor(
    tmp_path, monkeypatch, caplog, moment
):
    folder = tmp_path / "metrics"
    folder.mkdir()
    with Worker(folder) as worker:
        worker.do("serve")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    owner, name = MOMENTS[moment]
    original = getattr(owner, name)

    def after_deletion(*args, **kwargs):
        monkeypatch.undo()
        shutil.rmtree(folder)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, after_deletion)
    supervisor.worker_died(worker.process.pid)
    assert not folder.exists()
    (message,) = caplog.messages
    assert message.startswith(f"{folder} cannot be used (No such file or directory)")
