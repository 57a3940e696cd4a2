"""The engine process: a Core behind a ZeroMQ ROUTER. `python -m engine.process`, started by the supervisor.

    forever:  read what workers sent  ->  core.step()  ->  one Outputs to each worker concerned, Heartbeats when due

With the heartbeats the supervisor is told that the engine gets on: that it is idle, or that a step has ended since. It kills
an engine that has not said so for long.

An exception in a step ends the process: the supervisor starts another, and the workers submit again what they have in
flight. Exit codes: 0 after SIGTERM, 2 for a setting or checkpoint that is wrong (not worth another try), 1 for the rest.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from pathlib import Path

import msgspec
import setproctitle
import zmq

from engine import lifeline, logs, startup
from engine.config import EngineConfig
from engine.core import Core, build_core
from engine.errors import CheckpointError, ConfigError, TidegateError
from engine.messages import (
    HEARTBEAT_SECONDS,
    Abort,
    EngineMessage,
    Heartbeat,
    Hello,
    Outputs,
    Submit,
    Welcome,
    WorkerMessage,
    decode_worker_message,
    encode,
)
from engine.request import FinishReason, RequestFailure, TokenEvent

log = logging.getLogger("tidegate.engine")

EXIT_BAD_SETTINGS = 2
SEND_QUEUE = 4096  # messages kept for a worker that does not read; past it the worker is dropped
READS_PER_STEP = 1024  # so that a flood of messages does not keep the running requests waiting


class EngineStart(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor writes to the process's standard input, as JSON on one line."""

    config: EngineConfig
    endpoint: str
    index: int = 0
    log_level: str = "info"
    log_format: logs.LogFormat = "auto"


class EngineProcess:
    """Owns the core and the socket. A worker is known by its socket's identity, which is new with each connection."""

    def __init__(self, core: Core, endpoint: str) -> None:
        self._core = core
        self._info = core.info()
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a send to a worker that is gone is an error we hear of
        self._socket.setsockopt(zmq.SNDHWM, SEND_QUEUE)
        self._socket.setsockopt(zmq.RCVHWM, 0)  # the scheduler's queue is the one that is bounded
        self._socket.setsockopt(zmq.LINGER, 200)  # milliseconds
        self._endpoint = endpoint
        self._socket.bind(endpoint)
        self._workers: dict[bytes, str] = {}  # identity -> name
        self._lost: set[bytes] = set()  # could not be sent to; to be forgotten before the next step
        self._dropped: set[bytes] = set()  # did not read; to be told so once they do
        self._owners: dict[str, bytes] = {}  # request under way -> who asked for it
        self._heartbeat_at = 0.0
        self._told_step = -1  # the step counter when the supervisor last heard of us
        self._served = False  # whether the supervisor knows that a step has ended
        self._preparing = True  # until the core has nothing left to do for later steps
        self._stopping = False

    def stop(self) -> None:
        """Ask `run` to return; safe in a signal handler."""
        self._stopping = True

    def run(self) -> None:
        was_busy = False
        while not self._stopping:
            self._read(wait=not self._core.has_work and not self._prepare())
            while self._lost:
                self._forget(self._lost.pop())
            # Also where work begins, as the first step may be long, and where it ends: the workers judge an engine that has
            # work by its steps, and an idle one by its heartbeats.
            if time.monotonic() >= self._heartbeat_at or self._core.has_work != was_busy:
                self._send_heartbeats()
            was_busy = self._core.has_work
            if was_busy:
                self._send_events(self._core.step())
                if not self._core.has_work:
                    self._send_heartbeats()
                    was_busy = False

    def close(self) -> None:
        self._socket.close()
        self._context.term()
        self._core.close()

    def _prepare(self) -> bool:
        if self._preparing and not self._core.prepare():
            self._preparing = False
            self._heartbeat_at = 0.0  # from now on the workers expect quick turns again
        return self._preparing

    def _read(self, *, wait: bool) -> None:
        if wait:
            self._socket.poll(max(0, int((self._heartbeat_at - time.monotonic()) * 1000) + 1))
        for _ in range(READS_PER_STEP):
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = decode_worker_message(b"".join(frames))
            except TidegateError as error:  # a field of SamplingParams out of range, by a worker that did not check
                log.warning("a worker's message is refused: %s", error.message)
            except msgspec.MsgspecError as error:
                log.warning("a worker's message cannot be read: %s", error)
            else:
                self._handle(identity, message)

    def _handle(self, identity: bytes, message: WorkerMessage) -> None:
        if isinstance(message, Hello):
            self._welcome(identity, message.worker)
        elif identity not in self._workers or identity in self._lost:
            log.debug("a message of a worker that was dropped or never said Hello is ignored")
        elif isinstance(message, Submit):
            self._submit(identity, message)
        elif isinstance(message, Abort):
            for request_id in message.request_ids:
                if self._owners.get(request_id) == identity:
                    self._core.abort(request_id)

    def _welcome(self, identity: bytes, worker: str) -> None:
        for known, name in list(self._workers.items()):
            if name == worker:
                self._forget(known)
        self._dropped.discard(identity)
        self._workers[identity] = worker
        self._heartbeat_at = 0.0  # it must know how we are before what may be a long turn
        log.info("worker connected", extra={"worker": worker})
        self._send(identity, Welcome(self._info))

    def _submit(self, identity: bytes, submit: Submit) -> None:
        try:
            self._core.submit(submit)
        except TidegateError as error:
            failure = RequestFailure(type(error).__name__, error.message, error.param)
            self._send(identity, Outputs([TokenEvent(submit.request_id, [], FinishReason.ERROR, failure=failure)]))
        else:
            self._owners[submit.request_id] = identity

    def _forget(self, identity: bytes) -> None:
        """Abort what a worker had asked for."""
        self._workers.pop(identity, None)
        requests = [request_id for request_id, owner in self._owners.items() if owner == identity]
        for request_id in requests:
            del self._owners[request_id]
            self._core.abort(request_id)
        if requests:
            # Their last events leave the core now, without an owner, lest they end requests of the same names that the
            # worker submits next.
            self._send_events(self._core.step())

    def _send_events(self, events: list[TokenEvent]) -> None:
        outputs: dict[bytes, list[TokenEvent]] = {}
        for event in events:
            owner = self._owners.get(event.request_id) if event.finish is None else self._owners.pop(event.request_id, None)
            if owner is not None:
                outputs.setdefault(owner, []).append(event)
        for identity, its_events in outputs.items():
            self._send(identity, Outputs(its_events))

    def _send_heartbeats(self) -> None:
        self._heartbeat_at = time.monotonic() + HEARTBEAT_SECONDS
        self._keep_bound()
        heartbeat = Heartbeat(self._core.stats(), self._preparing)
        ended = heartbeat.stats.step - (1 if self._core.has_work else 0)  # with work to do, the latest step may not have ended
        if not self._served and ended > 0:
            self._served = True
            lifeline.tell(lifeline.SERVED)
        if not self._core.has_work or heartbeat.stats.step != self._told_step:
            self._told_step = heartbeat.stats.step
            lifeline.tell(lifeline.ALIVE)
        for identity in list(self._workers):
            self._send(identity, heartbeat)
        for identity in list(self._dropped):
            # A Welcome that nobody asked for tells the worker to connect anew.
            if self._try_send(identity, Welcome(self._info)) != "full":
                self._dropped.discard(identity)

    def _keep_bound(self) -> None:
        """Bind the socket again if its file was deleted, so that workers can connect. Connections that exist are not affected."""
        path = Path(self._endpoint.removeprefix("ipc://"))
        if path.exists() or not path.parent.exists():  # the supervisor makes the folder
            return
        try:
            self._socket.bind(self._endpoint)
        except zmq.ZMQError as error:  # the folder was deleted again: the next heartbeat tries once more
            log.warning("the engine's socket was deleted and cannot be bound again yet: %s", error)
        else:
            log.warning("the engine's socket was deleted and is bound again", extra={"path": str(path)})

    def _send(self, identity: bytes, message: EngineMessage) -> None:
        if identity not in self._workers or identity in self._lost:
            return
        outcome = self._try_send(identity, message)
        if outcome == "sent":
            return
        level = logging.WARNING if outcome == "full" else logging.DEBUG
        log.log(level, "worker dropped", extra={"worker": self._workers[identity], "why": outcome})
        self._lost.add(identity)
        if outcome == "full":
            self._dropped.add(identity)

    def _try_send(self, identity: bytes, message: EngineMessage) -> str:
        """Never blocks. Returns "sent", "full" (it does not read) or "gone"."""
        try:
            self._socket.send_multipart((identity, encode(message)), zmq.NOBLOCK)
        except zmq.Again:
            return "full"
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return "gone"
        return "sent"


def main() -> None:
    start = msgspec.json.decode(lifeline.read_start(), type=EngineStart)
    name = f"engine {start.index}"
    setproctitle.setproctitle(f"tidegate: {name}")
    logs.set_up(start.log_level, start.log_format, name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal is handled by the supervisor
    startup.keep_kernels()
    clock = startup.StartupClock(startup.process_seconds(), report=lambda: lifeline.tell(lifeline.ALIVE))
    try:
        core = build_core(start.config, clock)
    except (ConfigError, CheckpointError) as error:
        log.error(error.message)
        sys.exit(EXIT_BAD_SETTINGS)
    process = EngineProcess(core, start.endpoint)
    signal.signal(signal.SIGTERM, lambda *_: process.stop())
    info = core.info()
    log.info(
        "engine ready",
        extra={
            "model": info.model,
            "device": info.device,
            "blocks": info.num_blocks,
            "seconds": round(sum(info.startup.values()), 2),
            **{f"{phase}_seconds": round(seconds, 2) for phase, seconds in info.startup.items()},
        },
    )
    lifeline.tell(lifeline.READY)
    process.run()
    process.close()


if __name__ == "__main__":
    main()
