"""Tests of the line protocol between the supervisor and its children, with real processes."""

import signal
import subprocess
import sys

import pytest

from tests.support.children import ROOT

WAITS_FOR_A_WORD = """
import threading
from engine import lifeline
heard = threading.Event()
line = lifeline.read_start({lifeline.ALL_READY: heard.set})
lifeline.tell(b"started " + line)
heard.wait()
lifeline.tell(b"heard")
threading.Event().wait()
"""


def start(code):
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.parametrize(
    "pieces",
    [[b"{}\nall ready\n"], [b"{}\n", b"all ready\n"], [b"{}\nall re", b"ady\n"], [b"{}\nsomething\nall ready\nall ready\n"]],
    ids=["with the first line", "later", "in two pieces", "among others"],
)
def test_a_word_of_the_parent_calls_its_handler(pieces):
    child = start(WAITS_FOR_A_WORD)
    with child:
        child.stdin.write(pieces[0])
        child.stdin.flush()
        assert child.stdout.readline() == b"started {}\n"
        for piece in pieces[1:]:
            child.stdin.write(piece)
            child.stdin.flush()
        assert child.stdout.readline() == b"heard\n"
        child.kill()


def test_a_child_ends_with_the_pipe_of_its_parent():
    child = start(WAITS_FOR_A_WORD)
    with child:
        child.stdin.write(b"{}\n")
        child.stdin.flush()
        child.stdout.readline()
        child.stdin.close()
        assert child.wait(10) == -signal.SIGKILL


def test_a_program_without_a_parent_says_how_it_is_started():
    done = subprocess.run(
        [sys.executable, "-c", WAITS_FOR_A_WORD], cwd=ROOT, input=b"", capture_output=True, check=False, timeout=30
    )
    assert done.returncode == 1
    assert b"started by `tidegate serve`" in done.stderr


def test_a_parent_that_does_not_read_stops_nobody():
    """The child writes many times the 64 KiB that a pipe holds, and still ends, although nobody reads."""
    code = (
        "from engine import lifeline; import os; lifeline.read_start()\n"
        "for _ in range(100_000): lifeline.tell(lifeline.ALIVE)\nos._exit(7)"
    )
    child = start(code)
    with child:
        child.stdin.write(b"{}\n")
        child.stdin.flush()
        assert child.wait(60) == 7
