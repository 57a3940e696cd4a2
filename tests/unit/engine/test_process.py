"""Tests of EngineProcess in a thread of the test process, with FakeRunner and a real socket."""

from __future__ import annotations

import gc
import threading

import msgspec
import pytest
import zmq

from engine import lifeline
from engine.config import FakeConfig
from engine.core import Core
from engine.errors import ConfigError
from engine.fake import build_fake, expected_tokens
from engine.messages import (
    Abort,
    CacheReset,
    Heartbeat,
    Hello,
    ResetCache,
    StepEvents,
    Submit,
    Welcome,
    decode_engine_message,
    encode,
    pack_tokens,
)
from engine.process import READ_BYTES_PER_STEP, READS_PER_STEP, CollectorPauses, EngineProcess
from engine.request import CachedTokens, FinishReason, SamplingParams
from tests.support.local_engine import CONFIG, LIMITS
from tests.support.tier_rig import Gate

PARAMS = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)


class Worker:
    """Plays an API worker: it connects to the engine, sends Hello, and then sends and receives messages for the test."""

    def __init__(self, context, endpoint, name):
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, 20_000)
        self._socket.connect(endpoint)
        self.send(Hello(name))

    def send(self, message):
        self._socket.send(encode(message))

    def has_message(self, milliseconds=20):
        return self._socket.poll(milliseconds)

    def receive(self):
        return decode_engine_message(self._socket.recv())

    def receive_events(self, request_id):
        """Receive the events of a request until its last one. Returns the tokens received, and the finish reason."""
        tokens = []
        while True:
            message = self.receive()
            for event in message.events if isinstance(message, StepEvents) else ():
                assert event.request_id == request_id
                tokens += event.tokens
                if event.finish is not None:
                    return tokens, event.finish

    def close(self):
        self._socket.close()


class ScriptedPrepare:
    """Replaces `Core.prepare`. Each call waits until the test allows it. Nothing is left to prepare once `done` is set."""

    def __init__(self):
        self.done = False
        self._allowed = threading.Semaphore(0)

    def __call__(self):
        assert self._allowed.acquire(timeout=20)
        return not self.done

    def allow(self):
        self._allowed.release()

    def allow_until_message(self, worker):
        """Allow further calls of `prepare` until `worker` has received a message from the engine."""
        while not worker.has_message():
            self.allow()


class Running:
    """Runs an EngineProcess in a thread, and keeps the workers that are connected to it."""

    def __init__(self, core, endpoint):
        self.core = core
        self.process = EngineProcess(core, endpoint)
        self._endpoint, self._context, self._workers = endpoint, zmq.Context(), []
        self._thread = threading.Thread(target=self.process.run)
        self._thread.start()

    def connect(self, name="api 0"):
        self._workers.append(Worker(self._context, self._endpoint, name))
        return self._workers[-1]

    def stop(self):
        self.process.stop()

    def close(self):
        self._thread.join(20)
        assert not self._thread.is_alive()
        self.process.close()
        for worker in self._workers:
            worker.close()
        self._context.term()


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Return a function that starts an EngineProcess with a core of the given config."""
    monkeypatch.setattr("engine.process.lifeline.tell", lambda word: None)  # keep the test run's standard output clean
    running = []

    def start_one(config=CONFIG, prepare=None):
        core = Core(build_fake(config, LIMITS))
        if prepare is not None:
            monkeypatch.setattr(core, "prepare", prepare)
        running.append(Running(core, f"ipc://{tmp_path}/engine"))
        return running[-1]

    yield start_one
    for one in running:
        one.stop()
        one.close()


def test_an_idle_engine_reports_that_it_prepares_and_when_it_has_finished(start):
    prepare = ScriptedPrepare()
    engine = start(prepare=prepare)
    for name in ("first", "late"):
        worker = engine.connect(name)
        prepare.allow_until_message(worker)
        assert isinstance(worker.receive(), Welcome)
        heartbeat = worker.receive()  # arrives before the engine's next piece of preparation, which may be long
        assert isinstance(heartbeat, Heartbeat)
        assert heartbeat.preparing
    prepare.done = True
    while heartbeat.preparing:
        prepare.allow_until_message(worker)
        heartbeat = worker.receive()
    assert isinstance(heartbeat, Heartbeat)


def submit(prompt, request_id="r"):
    return Submit(request_id=request_id, prompt=pack_tokens(prompt), params=PARAMS, seed=0)


@pytest.mark.parametrize("aborted", [False, True], ids=["running", "aborted"])
def test_a_worker_that_connects_again_can_use_its_request_ids_at_once(start, aborted):
    """An earlier request with the same id produces no more events, whether it is running or its abort is not reported yet."""
    engine = start(msgspec.structs.replace(CONFIG, fake=FakeConfig(step_ms=20.0)))
    first = engine.connect()
    first.send(submit([5, 6]))
    while not isinstance(first.receive(), StepEvents):
        pass
    if aborted:
        first.send(Abort(["r"]))
    again = engine.connect()
    again.send(submit([7, 8]))
    assert isinstance(again.receive(), Welcome)
    assert again.receive_events("r") == (expected_tokens([7, 8], 40, PARAMS, 0, LIMITS), FinishReason.LENGTH)


def test_a_reset_is_answered_between_two_steps_and_running_requests_go_on(start):
    engine = start(msgspec.structs.replace(CONFIG, fake=FakeConfig(step_ms=1.0)))
    worker = engine.connect()
    prompt = list(range(2, 66))
    all_tokens = expected_tokens(prompt, 40, PARAMS, 0, LIMITS)
    worker.send(submit(prompt, "before"))
    assert worker.receive_events("before")[1] is FinishReason.LENGTH
    worker.send(submit(prompt, "running"))
    while not isinstance(first := worker.receive(), StepEvents):
        pass
    assert first.events[0].cached == CachedTokens(gpu=48)
    worker.send(ResetCache(7, ["gpu", "host"]))
    tokens, answer = list(first.events[0].tokens), None
    while answer is None:
        message = worker.receive()
        answer = message if isinstance(message, CacheReset) else None
        tokens += message.events[0].tokens if isinstance(message, StepEvents) else []
    assert (answer.number, answer.blocks) == (7, {"gpu": 6, "host": 0})  # the prompt, and 39 tokens behind it
    tokens += worker.receive_events("running")[0]
    assert tokens == all_tokens
    worker.send(submit(prompt, "after"))
    assert worker.receive_events("after") == (all_tokens, FinishReason.LENGTH)
    assert engine.core.stats().cached_tokens == 48


def test_reading_messages_runs_no_step(start):
    engine = start()
    in_read, steps_in_read = [], []
    read, step = engine.process._read, engine.core.step

    def watched_read():
        in_read.append(True)
        read()
        in_read.pop()

    def watched_step():
        steps_in_read.extend(in_read)
        return step()

    engine.process._read, engine.core.step = watched_read, watched_step
    for number in range(5):
        worker = engine.connect()
        worker.send(submit([5, number]))
        while not isinstance(worker.receive(), StepEvents):
            pass
    assert worker.receive_events("r")[1] is FinishReason.LENGTH
    assert steps_in_read == []


@pytest.mark.parametrize("num_tokens", [1, 10_000, 300_000])
def test_one_read_handles_a_bounded_number_of_messages_and_bytes(tmp_path, num_tokens):
    """Further messages are read after the next step, so neither many messages nor long prompts stall the running requests."""
    process, context = EngineProcess(Core(build_fake(CONFIG, LIMITS)), f"ipc://{tmp_path}/engine"), zmq.Context()
    worker, handled = Worker(context, f"ipc://{tmp_path}/engine", "api 0"), []
    sent = 2 * READS_PER_STEP if num_tokens == 1 else 100
    process._handle = lambda identity, message: handled.append(message)
    for _ in range(sent):
        worker.send(submit([5] * num_tokens))
    size = len(encode(submit([5] * num_tokens)))
    try:
        while len(handled) < 1 + sent:
            before = len(handled)
            assert process._socket.poll(20_000)
            process._read()
            # The message that exceeds the byte limit is still read, and the small Hello is one message more.
            assert len(handled) - before <= min(READS_PER_STEP, READ_BYTES_PER_STEP // size + 2)
    finally:
        process.close()
        worker.close()
        context.term()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("committed", "told"), [(0, []), (1, [lifeline.SERVED]), (19, [lifeline.SERVED])])
def test_an_engine_that_crashes_has_reported_its_first_committed_step(tmp_path, monkeypatch, overlap, committed, told):
    """The engine crashes after it has read a step's tokens, and before its next heartbeat."""
    monkeypatch.setattr("engine.process.HEARTBEAT_SECONDS", 3600.0)
    words = []
    monkeypatch.setattr("engine.process.lifeline.tell", words.append)
    core, context = Core(build_fake(msgspec.structs.replace(CONFIG, overlap=overlap), LIMITS)), zmq.Context()
    commit, num_commits = core._scheduler.commit, 0

    def crash_after_some(plan, result):
        nonlocal num_commits
        if num_commits == committed:
            raise RuntimeError("the device is lost")
        num_commits += 1
        return commit(plan, result)

    monkeypatch.setattr(core._scheduler, "commit", crash_after_some)
    process = EngineProcess(core, f"ipc://{tmp_path}/engine")
    worker = Worker(context, f"ipc://{tmp_path}/engine", "api 0")
    worker.send(submit([5, 6]))
    try:
        with pytest.raises(RuntimeError, match="the device is lost"):
            process.run()
    finally:
        process.close()
        worker.close()
        context.term()
    assert [word for word in words if word == lifeline.SERVED] == told


def test_full_garbage_collections_run_only_while_the_engine_is_idle(start):
    config = msgspec.structs.replace(CONFIG, debug_checks=False)
    engine = start(config)
    worker, collections = engine.connect(), []
    idle = threading.Event()

    def note(phase, info):
        if phase == "start" and info["generation"] == 2:
            collections.append(engine.core.has_work)
            idle.set()

    gc.callbacks.append(note)
    try:
        for number in range(64):
            worker.send(submit([number % 100] * 400, f"r{number}"))
        assert idle.wait(30)
    finally:
        gc.callbacks.remove(note)
    assert collections == [False]
    assert engine.core.stats().num_finished == 64


def test_the_garbage_collectors_settings_are_restored_at_the_end():
    before = gc.get_threshold(), list(gc.callbacks)
    pauses = CollectorPauses()
    assert gc.get_threshold() != before[0]
    assert gc.get_freeze_count() > 10_000
    gc.collect()
    assert pauses.longest > 0
    pauses.close()
    assert (gc.get_threshold(), list(gc.callbacks)) == before
    assert gc.get_freeze_count() == 0


def test_a_socket_that_cannot_be_made_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "missing" / "engine"
    with pytest.raises(ConfigError, match=rf"^the engine's socket {path} cannot be made: .*; set TMPDIR to another folder$"):
        EngineProcess(Core(build_fake(CONFIG, LIMITS)), f"ipc://{path}")


class GatedMoves:
    """Wraps a runner, whose moves between tiers arrive only while `gate` is set."""

    def __init__(self, runner):
        self.runner, self.num_blocks, self.num_compiled, self.submit = runner, runner.num_blocks, 0, runner.submit
        self.gate = threading.Event()
        self.gate.set()

    def poll(self, seconds=0.0):
        return self.runner.poll() if self.gate.wait(seconds) else []

    def prepare(self):
        return False

    def close(self):
        self.runner.close()


def test_the_loop_serves_others_and_sends_heartbeats_while_a_request_loads(start):
    cache = msgspec.structs.replace(CONFIG.cache, block_size=4, num_blocks=8, host_tier_bytes=100)
    config = msgspec.structs.replace(CONFIG, cache=cache, fake=FakeConfig(block_bytes=1), max_model_len=32)
    engine = start(config)
    runner = engine.core._runner = GatedMoves(engine.core._runner)
    worker, params = engine.connect(), SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)

    def submit(name, prompt):
        worker.send(Submit(request_id=name, prompt=pack_tokens(prompt), params=params, seed=0))

    submit("first", range(20, 37))
    first = worker.receive_events("first")
    submit("filler", range(1, 30))  # evicts the blocks of the first request
    worker.receive_events("filler")
    while engine.core.has_work:
        worker.receive()
    runner.gate.clear()
    submit("again", range(20, 37))
    beats = 0
    while beats < 3:
        message = worker.receive()
        beats += isinstance(message, Heartbeat) and message.stats.waiting == 1
    submit("other", [1, 2, 3])
    assert worker.receive_events("other")[1] is FinishReason.LENGTH
    runner.gate.set()
    assert worker.receive_events("again") == first


def disk_config(folder):
    cache = msgspec.structs.replace(
        CONFIG.cache,
        block_size=4,
        num_blocks=64,
        host_tier_bytes=64 * 4096,
        disk_tier_folder=str(folder),
        disk_tier_bytes=1 << 20,
    )
    return msgspec.structs.replace(CONFIG, cache=cache, fake=FakeConfig(block_bytes=4096), max_model_len=64)


def test_an_idle_engine_writes_what_finished_to_the_disk(start, tmp_path):
    worker = start(disk_config(tmp_path / "kv")).connect()
    worker.send(submit(range(20, 37)))
    worker.receive_events("r")
    while True:
        message = worker.receive()
        if isinstance(message, Heartbeat) and message.stats.tiers["disk"].num_demoted == 14:  # of 17 + 40 tokens, the last not
            break
    assert message.stats.running + message.stats.waiting == 0


def test_a_write_that_hangs_disturbs_neither_requests_nor_heartbeats(start, tmp_path, monkeypatch):
    engine = start(disk_config(tmp_path / "kv"))
    told = []
    monkeypatch.setattr("engine.process.lifeline.tell", told.append)
    gate = Gate(engine.core._disk.store, "write")
    worker = engine.connect()
    worker.send(submit(range(20, 37)))
    first = worker.receive_events("r")
    while not engine.core._disk.store.num_writing:
        worker.receive()
    worker.send(submit(range(20, 37), "again"))
    assert worker.receive_events("again") == first
    told.clear()
    for _ in range(3):
        assert isinstance(worker.receive(), Heartbeat)
    assert told.count(lifeline.ALIVE) >= 2
    assert engine.core._disk.store.num_writing
    gate.open()
