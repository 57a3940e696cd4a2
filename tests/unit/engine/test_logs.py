"""Tests of the format of log lines, and of log lines that cannot be written because nobody reads them."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading

import pytest

from engine import logs
from engine.config import EngineConfig
from engine.core import build_core
from tests.support.children import wait_until
from tests.support.tiny_checkpoint import write_tiny_checkpoint

LINE = b"x" * 999 + b"\n"


@pytest.fixture
def restored(monkeypatch):
    """Undo the changes that `logs.set_up` makes in this process, after the test."""
    root, cython = logging.getLogger(), logging.getLogger("grpc._cython")
    before = root.level, root.handlers[:], cython.level
    for module, name in ((sys, "excepthook"), (threading, "excepthook"), (sys, "stderr")):
        monkeypatch.setattr(module, name, getattr(module, name))
    yield
    logging.captureWarnings(False)
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    cython.setLevel(before[2])


@pytest.fixture
def pipe():
    read, write = os.pipe()
    yield read, write
    os.close(read)
    os.close(write)


def record(**extra):
    made = logging.LogRecord("tidegate", logging.INFO, "file", 1, "engine ready", None, None)
    vars(made).update(extra)
    return made


def read_until(fd, last):
    """Read and return all bytes from `fd`, until they contain the text `last`."""
    got = b""
    while last not in got:
        got += os.read(fd, 1 << 16)
    return got


def test_a_readable_line_quotes_values_whose_end_is_not_clear():
    line = logs.HumanFormatter("engine 0").format(record(device="CPU, 2 threads", model="demo-v1", blocks=64, why="", said='"'))
    assert line.endswith('engine ready device="CPU, 2 threads" model=demo-v1 blocks=64 why="" said="\\""')


def test_a_line_for_machines_is_json():
    line = json.loads(logs.JsonFormatter("engine 0").format(record(device="CPU, 2 threads", blocks=64)))
    assert (line["message"], line["device"], line["blocks"]) == ("engine ready", "CPU, 2 threads", 64)


def test_grpcs_debug_lines_about_polling_are_left_out(restored):
    logs.set_up("debug", "json", "api 0")
    assert not logging.getLogger("grpc._cython.cygrpc").isEnabledFor(logging.DEBUG)
    assert logging.getLogger("tidegate.worker").isEnabledFor(logging.DEBUG)


def test_lines_for_a_pipe_that_nobody_reads_are_dropped_counted_and_reported(pipe):
    read, write = pipe
    writer = logs.LineWriter(write, logs.JsonFormatter("api 0"))
    seen = []
    num_lines = 3 * logs.MAX_QUEUED_BYTES // len(LINE)
    for _ in range(num_lines // 2):
        writer.put(LINE)
    writer.on_dropped(seen.append)  # is called for the lines that are lost already, too
    for _ in range(num_lines - num_lines // 2):
        writer.put(LINE)
    wait_until(lambda: sum(seen) == writer.num_dropped, "all dropped lines are counted")
    assert 0 < writer.num_dropped < num_lines
    assert not writer.flush(0.01)

    written, reported = 0, 0
    with open(os.dup(read), "rb") as log:
        while written + reported < num_lines:  # there may be several reports
            line = log.readline()
            written += line == LINE
            reported += 0 if line == LINE else json.loads(line)["dropped_lines"]
    assert written + reported == num_lines
    assert reported == writer.num_dropped


@pytest.mark.parametrize("fills_the_queue", [False, True], ids=["cannot-be-written", "does-not-fit"])
def test_the_callback_for_dropped_lines_may_log_while_another_thread_logs(restored, pipe, fills_the_queue):
    """A thread that logs holds the handler's lock while it waits for the writer's. The callback waits for the handler's lock."""
    fd = os.dup(pipe[1]) if fills_the_queue else os.open("/dev/full", os.O_WRONLY)
    formatter = logs.JsonFormatter("api 0")
    handler = logs.QueueHandler(logs.LineWriter(fd, formatter), formatter)
    log, called, logged = logging.Logger("metrics"), threading.Event(), threading.Event()
    log.addHandler(handler)

    def callback(number):
        called.set()
        if not logged.is_set():
            log.warning("dropped")
        logged.set()

    handler.writer.on_dropped(callback)
    putter = threading.Thread(target=handler.writer.put, args=(LINE,), daemon=True)
    with handler.lock:
        handler.writer.put(b"x" * (logs.MAX_QUEUED_BYTES + 1) if fills_the_queue else LINE)
        assert called.wait(20)
        putter.start()
        putter.join(20)
        assert not putter.is_alive()
        assert not logged.is_set()
    assert logged.wait(20)
    assert handler.writer.flush(20)
    os.close(fd)


def test_a_report_stands_where_the_lines_are_missing(pipe):
    """A line that is logged after a dropped line is written after the report of the dropped line."""
    read, write = pipe
    writer = logs.LineWriter(write, logs.JsonFormatter("api 0"))
    writer.put(b"y" * (logs.MAX_QUEUED_BYTES + 1))
    writer.put(b"after\n")
    assert read_until(read, b"after\n").splitlines()[-2].find(b"1 log line was dropped here") > 0


def test_a_reader_that_closed_its_end_does_not_stop_the_writer(pipe):
    read, write = os.pipe()
    writer = logs.LineWriter(write, logs.JsonFormatter("api 0"))
    os.close(read)
    for _ in range(3 * logs.MAX_QUEUED_BYTES // len(LINE)):
        writer.put(LINE)
    assert writer.flush(20)
    assert writer.num_dropped == 3 * logs.MAX_QUEUED_BYTES // len(LINE)
    os.close(write)


def test_lines_that_a_full_disk_refuses_are_counted_and_reported_once_it_has_space(pipe):
    read, write = pipe
    fd = os.open("/dev/full", os.O_WRONLY)
    writer = logs.LineWriter(fd, logs.JsonFormatter("api 0"))
    for _ in range(3):
        writer.put(LINE)
    assert writer.flush(20)
    assert writer.num_dropped == 3
    os.dup2(write, fd)
    writer.put(b"after\n")
    report, after = read_until(read, b"after\n").splitlines()
    assert json.loads(report)["dropped_lines"] == 3
    assert after == b"after"
    assert writer.flush(20)
    os.close(fd)


def test_a_non_blocking_descriptor_loses_no_line(pipe):
    read, write = pipe
    os.set_blocking(write, False)
    writer = logs.LineWriter(write, logs.JsonFormatter("api 0"))
    for _ in range(200):  # 200 lines are more than a pipe holds
        writer.put(LINE)
    writer.put(b"last\n")
    assert read_until(read, b"last\n").count(LINE) == 200


def test_an_engine_reports_its_dropped_lines_in_its_stats(restored, tmp_path, pipe):
    core = build_core(EngineConfig(model=str(write_tiny_checkpoint(tmp_path)), runner="fake"))
    formatter = logs.JsonFormatter("engine 0")
    handler = logs.QueueHandler(logs.LineWriter(pipe[1], formatter), formatter)
    logging.getLogger().addHandler(handler)
    for _ in range(3):
        handler.writer.put(bytes(logs.MAX_QUEUED_BYTES + 1))
    assert core.stats().log_lines_dropped == 3


CHILD = """
import logging, signal, sys, threading, warnings
from engine import logs
logs.set_up("info", "json", "child")
{body}
"""


def child(body, **options):
    code = CHILD.format(body=body)
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)


def lines_of(body):
    process = child(body)
    _, err = process.communicate(timeout=30)
    return process.returncode, [json.loads(line) for line in err.splitlines()]


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("logging.error('the last words'); sys.exit(2)", 2, "the last words"),
        ("raise ValueError('a bug')", 1, "the process ends: ValueError"),
        ("t = threading.Thread(target=int, args=('x',), name='aside'); t.start(); t.join()", 0, "thread aside ends: ValueError"),
        ("warnings.warn('old')", 0, "UserWarning: old"),
        ("print('printed by a library', file=sys.stderr)", 0, "printed by a library"),
        ("logging.warning('%d things', 'many')", 0, "cannot be formatted"),
    ],
    ids=["error-and-exit", "uncaught", "thread", "warning", "print", "wrong-arguments"],
)
def test_what_a_process_says_before_it_ends_is_in_the_log(body, code, message):
    returncode, lines = lines_of(body)
    assert returncode == code
    assert message in lines[-1]["message"]


def test_a_thousand_lines_before_the_end_are_all_written():
    _, lines = lines_of("for i in range(1000): logging.info('line %d', i)")
    assert [line["message"] for line in lines] == [f"line {i}" for i in range(1000)]


FLOOD = "for i in range(20_000): logging.info('x' * 200)\n"


def test_a_process_whose_log_nobody_reads_goes_on_and_ends():
    process = child(FLOOD + "print('went on', flush=True)\nsys.exit(3)")
    assert process.stdout.readline() == "went on\n"
    assert process.wait(30) == 3
    process.communicate()


def test_sigterm_ends_a_process_whose_log_nobody_reads():
    process = child(FLOOD + "print('went on', flush=True)\nsignal.pause()")
    assert process.stdout.readline() == "went on\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM
    process.communicate()


def test_without_a_standard_error_nothing_is_written_to_descriptor_2(tmp_path):
    """A process that began without descriptor 2 may open a file under that number. Log lines must not go to that file."""
    code = f"import os\nos.dup2(os.open({str(tmp_path / 'data')!r}, os.O_RDWR | os.O_CREAT), 2)\n" + CHILD.format(
        body="logging.error('lost'); print('printed', file=sys.stderr)"
    )
    assert subprocess.call(["sh", "-c", 'exec 2>&-; exec "$@"', "sh", sys.executable, "-c", code]) == 0
    assert (tmp_path / "data").read_bytes() == b""


def test_a_throttled_warning_counts_what_it_does_not_log(caplog):
    log = logging.getLogger("test")
    often, seldom = logs.ThrottledWarning(log, "refused", 0.0), logs.ThrottledWarning(log, "refused", 3600.0)
    for warning in (often, seldom):
        for _ in range(3):
            warning(limit=5)
    assert [line.times for line in caplog.records] == [1, 1, 1, 1]
    seldom._next_at = 0.0
    seldom(limit=5)
    assert (caplog.records[-1].times, caplog.records[-1].limit) == (3, 5)
