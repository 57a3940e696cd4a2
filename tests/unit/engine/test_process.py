"""EngineProcess in a thread of the test's, with a core that prepares when the test says so."""

from __future__ import annotations

import threading

import pytest
import zmq

from engine.core import Core
from engine.fake import build_fake
from engine.messages import Heartbeat, Hello, Welcome, decode_engine_message, encode
from engine.process import EngineProcess
from tests.support.local_engine import CONFIG, LIMITS


class Worker:
    def __init__(self, context, endpoint, name):
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, 20_000)
        self._socket.connect(endpoint)
        self._socket.send(encode(Hello(name)))

    def hears(self, milliseconds=20):
        return self._socket.poll(milliseconds)

    def hear(self):
        return decode_engine_message(self._socket.recv())

    def close(self):
        self._socket.close()


class Preparing:
    """`Core.prepare`, a piece each time that the test lets it; nothing is left once the test says so."""

    def __init__(self):
        self.done = False
        self._may = threading.Semaphore(0)

    def __call__(self):
        assert self._may.acquire(timeout=20)
        return not self.done

    def let(self):
        self._may.release()

    def let_until(self, worker):
        """Piece by piece until `worker` hears: what it said may come to the engine while one is under way."""
        while not worker.hears():
            self.let()


@pytest.fixture
def preparing(tmp_path, monkeypatch):
    """(a function that connects a worker, what the engine prepares)"""
    monkeypatch.setattr("engine.process.lifeline.tell", lambda word: None)  # standard output is the test's
    core, endpoint, pieces = Core(build_fake(CONFIG, LIMITS)), f"ipc://{tmp_path}/engine", Preparing()
    monkeypatch.setattr(core, "prepare", pieces)
    process, context, workers = EngineProcess(core, endpoint), zmq.Context(), []
    thread = threading.Thread(target=process.run)
    thread.start()

    def connect(name):
        workers.append(Worker(context, endpoint, name))
        return workers[-1]

    yield connect, pieces
    process.stop()
    pieces.let()
    thread.join(20)
    assert not thread.is_alive()
    process.close()
    for worker in workers:
        worker.close()
    context.term()


def test_an_idle_engine_says_that_it_prepares_and_when_it_is_done(preparing):
    connect, pieces = preparing
    for name in ("first", "late"):
        worker = connect(name)
        pieces.let_until(worker)
        assert isinstance(worker.hear(), Welcome)
        told = worker.hear()  # before the next piece, which may be a long one
        assert isinstance(told, Heartbeat)
        assert told.preparing
    pieces.done = True
    while told.preparing:
        pieces.let_until(worker)
        told = worker.hear()
    assert isinstance(told, Heartbeat)
