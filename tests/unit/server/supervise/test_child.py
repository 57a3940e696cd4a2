"""Tests of Child, with real processes. tests/e2e/test_serve.py and tests/e2e/test_failures.py test whole servers."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys

import psutil
import pytest

from server.settings import Settings
from server.supervise import crashes
from server.supervise.child import Child, Fatal, Program, Timeout
from tests.support.children import ROOT
from tests.support.manual_timers import ManualTimers

READY, SERVED, ALIVE = (f"lifeline.tell(lifeline.{word})" for word in ("READY", "SERVED", "ALIVE"))
EXIT = "sys.exit({})"
HANG = "wait()"


def child_of(module, line, **settings):
    settings = Settings(**settings)
    return Child(Program("child", module, lambda: line, Timeout("stall_timeout_s", settings.stall_timeout_s)), settings)


def scripted(*lives, call_later=None, **settings):
    """A child whose process number i runs `lives[i]`, and later ones the last of them. `starts` counts the processes."""
    count = 0

    def line():
        nonlocal count
        count += 1
        return "; ".join(lives[min(count, len(lives)) - 1]).encode()

    settings = Settings(**settings)
    stall = Timeout("stall_timeout_s", settings.stall_timeout_s)
    child = Child(Program("child", "tests.support.scripted", line, stall), settings, call_later)
    return child, lambda: count


@contextlib.asynccontextmanager
async def running(child):
    task = asyncio.create_task(child.run())
    try:
        yield task
    finally:
        child.kill()
        await asyncio.wait({task}, timeout=10)
        task.cancel()


async def until_ready(child, task, condition=lambda: True):
    """Wait until the child becomes ready while `condition` holds. If `task`, the child's run, ends first, raise its exception."""
    reached = asyncio.Event()
    child.on_ready = lambda: reached.set() if condition() else None
    if child.ready.is_set():
        child.on_ready()
    waiting = asyncio.create_task(reached.wait())
    await asyncio.wait({waiting, task}, timeout=60, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()
    assert reached.is_set()


async def test_a_death_is_noticed_while_a_grandchild_keeps_the_output_open(tmp_path):
    path = tmp_path / "grandchild"
    died = asyncio.Event()
    child = child_of("tests.support.stubborn", os.fsencode(path))
    child.on_death = lambda pid: died.set()
    async with running(child) as task:
        await until_ready(child, task)
        grandchild = psutil.Process(int(path.read_text()))
        try:
            child._signal(signal.SIGKILL)
            await asyncio.wait_for(died.wait(), 10)
            assert grandchild.is_running()
        finally:
            grandchild.kill()
        await until_ready(child, task)  # the child is started again
        second = psutil.Process(int(path.read_text()))
        assert second.pid != grandchild.pid
        second.kill()


@pytest.mark.parametrize(("end", "logged"), [(Child.kill, []), (Child.stop, ["child ended badly"])], ids=["killed", "stopped"])
async def test_a_child_that_we_killed_is_not_said_to_have_ended_badly(caplog, end, logged):
    child, _ = scripted([READY, HANG])
    async with running(child) as task:
        await until_ready(child, task)
        end(child)
        await asyncio.wait_for(task, 20)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == logged


@pytest.mark.parametrize(
    "life",
    [
        [EXIT.format(1)],
        [READY, EXIT.format(1)],
        [ALIVE, EXIT.format(0)],
        ["os.kill(os.getpid(), 9)"],
    ],
    ids=["never ready", "ready", "ended without a request", "killed"],
)
async def test_deaths_without_work_in_between_end_the_server_however_far_apart_they_are(life):
    """Every death counts. A process that was never ready is never stable, and a ready one only after crash_window_s, a minute."""
    child, starts = scripted(life, crash_limit=3, crash_window_s=60 if READY in life else 0.01)
    async with running(child) as task:
        with pytest.raises(Fatal, match="died 3 times and served nothing in between") as caught:
            await asyncio.wait_for(task, 60)
    assert caught.value.exit_code == 1
    assert starts() == 3


async def test_deaths_of_a_child_that_has_served_do_not_add_up():
    child, starts = scripted(*[[READY, SERVED, EXIT.format(1)]] * 5, [READY, HANG], crash_limit=2)
    async with running(child) as task:
        await until_ready(child, task, lambda: starts() == 6)


async def test_bad_settings_are_fatal_before_the_first_readiness():
    child, starts = scripted([EXIT.format(2)])
    async with running(child) as task:
        with pytest.raises(Fatal) as caught:
            await asyncio.wait_for(task, 30)
    assert (caught.value.exit_code, caught.value.message) == (2, None)
    assert starts() == 1


async def test_after_readiness_the_exit_code_of_bad_settings_is_a_death_like_others():
    child, starts = scripted([READY, EXIT.format(1)], [EXIT.format(2)], [EXIT.format(2)], [READY, HANG])
    async with running(child) as task:
        await until_ready(child, task, lambda: starts() == 4)


@pytest.mark.parametrize(
    ("life", "settings", "named"),
    [
        ([HANG], {"start_timeout_s": 1, "stall_timeout_s": 3600}, "start_timeout_s"),
        ([ALIVE, HANG], {"start_timeout_s": 1, "stall_timeout_s": 3600}, "start_timeout_s"),
        ([READY, HANG], {"start_timeout_s": 3600, "stall_timeout_s": 1}, "stall_timeout_s"),
        ([ALIVE, READY, HANG], {"start_timeout_s": 3600, "stall_timeout_s": 1}, "stall_timeout_s"),
        ([READY, ALIVE, "os.kill(os.getpid(), 19)"], {"start_timeout_s": 3600, "stall_timeout_s": 1}, "stall_timeout_s"),
    ],
    ids=[
        "silent from the start",
        "hung in the middle of its start",
        "hung as soon as it was ready",
        "hung as soon as it was ready, after a long start",
        "stopped once ready",
    ],
)
async def test_a_child_that_reports_no_progress_is_killed(caplog, life, settings, named):
    child, _ = scripted(life, crash_limit=1, **settings)
    async with running(child) as task:
        with pytest.raises(Fatal, match="killed by SIGKILL"):
            await asyncio.wait_for(task, 30)
    (record,) = [record for record in caplog.records if record.getMessage() == "child makes no progress and is killed"]
    assert getattr(record, named) == 1


async def test_a_long_start_that_reports_progress_is_not_killed(caplog):
    """Each report arrives 0.99 s after the one before, on the clock of `timers`."""
    timers = ManualTimers()
    child, starts = scripted([*[ALIVE] * 40, READY, HANG], call_later=timers.call_later, start_timeout_s=1)
    on_line = child._on_line

    def on_late_line(line):
        timers.advance(0.99)
        on_line(line)

    child._on_line = on_late_line
    async with running(child) as task:
        await until_ready(child, task)
    assert (starts(), caplog.records) == (1, [])


@pytest.mark.parametrize("end", [Child.stop, Child.hurry, Child.kill], ids=["stopped", "hurried", "killed"])
@pytest.mark.parametrize("can_start", [True, False], ids=["after a death", "after a start that failed"])
async def test_a_request_to_end_does_not_wait_for_the_pause_before_the_next_start(monkeypatch, caplog, end, can_start):
    for name in ("FIRST_PAUSE_SECONDS", "MAX_PAUSE_SECONDS"):
        monkeypatch.setattr(crashes, name, 3600.0)
    if not can_start:
        monkeypatch.setattr("server.supervise.child.sys.executable", "/nowhere/python")
    child, starts = scripted([EXIT.format(1)])
    logged = asyncio.Event()
    with caplog.filtering(lambda record: logged.set() or True):
        async with running(child) as task:
            await asyncio.wait_for(logged.wait(), 30)
            end(child)
            await asyncio.wait_for(task, 20)
    assert (starts(), caplog.messages) == (1, ["child died, starting it again"])


async def test_a_child_that_cannot_be_started_has_died_and_is_tried_again(monkeypatch, caplog):
    monkeypatch.setattr("server.supervise.child.sys.executable", "/nowhere/python")
    child, starts = scripted([READY, HANG], crash_limit=3)
    async with running(child) as task:
        with pytest.raises(Fatal, match="could not be started"):
            await asyncio.wait_for(task, 30)
    assert starts() == 3
    assert [record.getMessage() for record in caplog.records] == ["child died, starting it again"] * 2


WITHOUT_THREADS = """
import asyncio, logging, resource
from pathlib import Path
import psutil
from server.settings import Settings
from server.supervise.child import Child, Program, Timeout

reasons = []

class Keep(logging.Handler):
    def emit(self, record):
        reasons.append(record.why)

logging.getLogger("tidegate.supervisor").addHandler(Keep())

async def main():
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    code = b"lifeline.tell(lifeline.READY); wait()"
    program = Program("child", "tests.support.scripted", lambda: code, Timeout("stall_timeout_s", 30))
    child = Child(program, Settings(crash_limit=99))
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), limits[1]))  # a thread's stack alone takes more
    running = asyncio.create_task(child.run())
    while not reasons:
        await asyncio.sleep(0)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    await child.ready.wait()
    print(reasons[0])
    print(sum(process.status() != psutil.STATUS_ZOMBIE for process in psutil.Process().children()))
    child.kill()
    await running

asyncio.run(main())
"""


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="asyncio needs a thread for each child on Python 3.11 only")
def test_a_process_that_cannot_be_watched_for_lack_of_threads_is_killed_and_tried_again():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THREADS], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    reason, alive = done.stdout.splitlines()
    assert reason.startswith("it could not be started"), done.stderr
    assert alive == "1"
