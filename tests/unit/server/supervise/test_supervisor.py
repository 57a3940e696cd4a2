"""Child: a process of the supervisor's. Whole servers are in tests/e2e/test_serve.py."""

import asyncio
import contextlib
import os
import signal

import psutil
import pytest

from server.settings import Settings
from server.supervise.supervisor import Child


@contextlib.asynccontextmanager
async def running(child):
    task = asyncio.create_task(child.run())
    try:
        yield
    finally:
        child.kill()
        await asyncio.wait({task}, timeout=10)
        task.cancel()


async def test_a_death_is_noticed_while_a_grandchild_keeps_the_output(tmp_path):
    path = tmp_path / "grandchild"
    died = asyncio.Event()
    child = Child("stubborn", "tests.support.stubborn", os.fsencode(path), Settings())
    child.on_death = lambda pid: died.set()
    async with running(child):
        await asyncio.wait_for(child.ready.wait(), 20)
        grandchild = psutil.Process(int(path.read_text()))
        try:
            child._signal(signal.SIGKILL)
            await asyncio.wait_for(died.wait(), 10)
            assert grandchild.is_running()
        finally:
            grandchild.kill()
        await asyncio.wait_for(child.ready.wait(), 20)  # it was started again
        second = psutil.Process(int(path.read_text()))
        assert second.pid != grandchild.pid
        second.kill()


@pytest.mark.parametrize(("end", "logged"), [(Child.kill, []), (Child.stop, ["console ended badly"])], ids=["killed", "stopped"])
async def test_a_child_that_we_killed_is_not_said_to_have_ended_badly(caplog, end, logged):
    # Python's console runs what it is sent, and ends badly at SIGTERM. The new line first parts "ready" from its prompt.
    console = Child("console", "code", b"import os; _ = os.write(1, b'\\nready\\n')", Settings())
    ending = asyncio.create_task(console.run())
    async with asyncio.timeout(20):
        await console.ready.wait()
        end(console)
        await ending
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == logged
