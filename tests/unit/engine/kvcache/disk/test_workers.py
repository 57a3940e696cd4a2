"""Tests the threads of the disk tier: who goes first, what is refused, and that every move comes back."""

import threading
import time

import pytest

from engine.errors import InternalError
from engine.kvcache.disk.outcome import Outcome
from engine.kvcache.disk.workers import Kind, Move, Workers

STUCK = 30.0


class Gate:
    """A move that runs until the test opens it."""

    def __init__(self):
        self.began, self.may_end = threading.Event(), threading.Event()

    def __call__(self):
        self.began.set()
        assert self.may_end.wait(STUCK)
        return Outcome.OK


@pytest.fixture
def make():
    """Yield a function that makes Workers, which the fixture closes."""
    made = []

    def make(threads=1, max_reads=10, max_writes=10, clock=time.monotonic):
        made.append(Workers(threads, max_reads, max_writes, clock))
        return made[-1]

    yield make
    for workers in made:
        assert workers.close(STUCK)


def move(kind, slot, run=lambda: Outcome.OK):
    return Move(kind, slot, b"", run)


def all_ended(workers, number):
    ended = []
    while len(ended) < number:
        ended += workers.poll(STUCK)
    return ended


def test_reads_go_before_writes_and_writes_before_upkeep(make):
    workers = make()
    gate, order = Gate(), []
    workers.submit(move(Kind.WRITE, 0, gate))
    assert gate.began.wait(STUCK)

    def note(name):
        order.append(name)
        return False

    done = threading.Event()
    workers.keep_up(lambda: note("upkeep"))
    workers.keep_up(lambda: bool(done.set()))
    for slot in (1, 2):
        workers.submit(move(Kind.WRITE, slot, lambda slot=slot: note(f"write {slot}") or Outcome.OK))
        workers.submit(move(Kind.READ, slot, lambda slot=slot: note(f"read {slot}") or Outcome.OK))
    gate.may_end.set()
    assert done.wait(STUCK)
    assert order == ["read 1", "read 2", "write 1", "write 2", "upkeep"]
    assert [ended.slot for ended in all_ended(workers, 5)] == [0, 1, 2, 1, 2]


def test_writes_that_hang_leave_a_thread_for_reads(make):
    workers = make(threads=3)
    gates = [Gate() for _ in range(4)]
    for slot, gate in enumerate(gates):
        workers.submit(move(Kind.WRITE, slot, gate))
    assert all(gate.began.wait(STUCK) for gate in gates[:2])
    workers.submit(move(Kind.READ, 9))
    assert [ended.kind for ended in all_ended(workers, 1)] == [Kind.READ]
    assert not any(gate.began.is_set() for gate in gates[2:])
    for gate in gates:
        gate.may_end.set()
    all_ended(workers, 4)


@pytest.mark.parametrize(("kind", "room"), [(Kind.READ, 2), (Kind.WRITE, 3)])
def test_a_full_queue_refuses_at_once(make, kind, room):
    workers = make(max_reads=2, max_writes=3)
    gate = Gate()
    workers.submit(move(Kind.READ, 0, gate))
    assert gate.began.wait(STUCK)
    assert [workers.submit(move(kind, slot)) for slot in range(5)] == [True] * room + [False] * (5 - room)
    gate.may_end.set()
    assert len(all_ended(workers, room + 1)) == room + 1


def test_while_refusing_every_move_ends_with_off_though_all_threads_hang(make):
    workers = make()
    gate = Gate()
    workers.submit(move(Kind.READ, 0, gate))
    assert gate.began.wait(STUCK)
    workers.submit(move(Kind.READ, 1))
    workers.submit(move(Kind.WRITE, 2))
    workers.refuse(True)
    workers.submit(move(Kind.READ, 3))
    assert [(ended.slot, ended.outcome) for ended in workers.poll()] == [(slot, Outcome.OFF) for slot in (1, 2, 3)]
    gate.may_end.set()
    assert all_ended(workers, 1)[0].outcome is Outcome.OK
    workers.refuse(False)
    workers.submit(move(Kind.READ, 4))
    assert all_ended(workers, 1)[0].outcome is Outcome.OK


def test_work_that_runs_alone_waits_for_what_runs_and_precedes_what_waits(make):
    workers = make(threads=3)
    gate, order, done = Gate(), [], threading.Event()
    workers.submit(move(Kind.READ, 0, gate))
    assert gate.began.wait(STUCK)
    workers.run_alone(lambda: bool(order.append("alone")))
    workers.submit(move(Kind.READ, 1, lambda: order.append("read") or Outcome.OK))
    workers.keep_up(lambda: bool(done.set()))
    assert order == []
    gate.may_end.set()
    assert done.wait(STUCK)
    assert len(all_ended(workers, 2)) == 2
    assert order == ["alone", "read"]


def test_upkeep_with_more_to_do_is_called_again(make):
    workers = make()
    left, done = [3], threading.Event()

    def step():
        left[0] -= 1
        if not left[0]:
            done.set()
        return bool(left[0])

    workers.keep_up(step)
    assert done.wait(STUCK)
    assert left == [0]


def test_the_age_of_the_oldest_read_is_known(make):
    now = [10.0]
    workers = make(clock=lambda: now[0])
    gate = Gate()
    assert workers.longest_read() == 0.0
    workers.submit(move(Kind.READ, 0, gate))
    assert gate.began.wait(STUCK)
    now[0] = 14.0
    assert workers.longest_read() == 4.0
    gate.may_end.set()
    assert all_ended(workers, 1)[0].seconds == 4.0
    assert workers.longest_read() == 0.0


def test_closing_finishes_what_is_queued(make):
    workers = make()
    written = []
    for slot in range(5):
        workers.submit(move(Kind.WRITE, slot, lambda slot=slot: written.append(slot) or Outcome.OK))
    assert workers.close(STUCK)
    assert written == [0, 1, 2, 3, 4]
    assert not workers.submit(move(Kind.WRITE, 5))


def test_closing_gives_up_on_a_thread_that_hangs(make):
    workers = make()
    gate = Gate()
    workers.submit(move(Kind.WRITE, 0, gate))
    assert gate.began.wait(STUCK)
    assert not workers.close(0.0)
    gate.may_end.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("kind", ["move", "upkeep"])
def test_an_exception_in_a_thread_raises_in_poll(make, kind):
    def fail():
        raise ValueError("a mistake in the code")

    workers = make(threads=2)
    if kind == "move":
        workers.submit(move(Kind.READ, 0, fail))
    else:
        workers.keep_up(fail)
    with pytest.raises(InternalError, match="ended by an exception"):
        workers.poll(STUCK)


def test_a_poll_does_not_wait_when_upkeep_ended_before_it(make, monkeypatch):
    workers = make()
    done = threading.Event()
    workers.keep_up(lambda: False)
    workers.keep_up(lambda: bool(done.set()))
    assert done.wait(STUCK)  # one thread does both, so the end of the first is noted

    def wait(seconds):
        raise AssertionError("the poll waits although there is news")

    monkeypatch.setattr(workers._news, "wait", wait)
    assert workers.poll(STUCK) == []
