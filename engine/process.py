"""The engine process: a Core behind a ZeroMQ ROUTER socket. The supervisor starts it as `python -m engine.process`.

    loop:  read the workers' messages  ->  core.step()  ->  StepEvents to each worker concerned, Heartbeats when due

Together with each round of heartbeats the process reports to the supervisor that it makes progress: it is idle, or a step
has ended since the last report. The supervisor kills an engine that has not reported for too long.

An exception in a step ends the process. The supervisor then starts another engine, and the workers submit their unfinished
requests again. Exit codes: 0 after SIGTERM, 2 for a wrong setting or checkpoint (another start would fail too), 1 otherwise.
"""

from __future__ import annotations

import gc
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
from engine.errors import EXIT_BAD_SETTINGS, CheckpointError, ConfigError, TidegateError
from engine.messages import (
    HEARTBEAT_SECONDS,
    Abort,
    CacheReset,
    EngineMessage,
    Heartbeat,
    Hello,
    ResetCache,
    StepEvents,
    Submit,
    Welcome,
    WorkerMessage,
    decode_worker_message,
    encode,
)
from engine.request import FinishReason, RequestFailure, TokenEvent

log = logging.getLogger("tidegate.engine")

SEND_QUEUE = 4096  # messages kept for a worker that does not read; a worker with more is dropped
READS_PER_STEP = 1024  # messages read between two steps, so that a flood of messages does not stall running requests
READ_BYTES_PER_STEP = 4 << 20  # bytes of messages read between two steps: a million prompt tokens, or some milliseconds
GC_THRESHOLDS = (5000, 20, 100)  # a young collection visits a few thousand objects, which takes less than a millisecond


class EngineStart(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of an engine process. The supervisor writes them to standard input, as one line of JSON."""

    config: EngineConfig
    endpoint: str
    index: int = 0
    log_level: str = "info"
    log_format: logs.LogFormat = "auto"


class CollectorPauses:
    """Keeps the pauses by Python's garbage collector short, and measures the longest one.

    Objects that exist after start-up, or after preparation, stay until the process ends. `freeze` excludes them from further
    collections. Full collections run while the engine is idle (`collect`). The structures of requests contain no reference
    cycles, so memory does not depend on these collections.
    """

    def __init__(self) -> None:
        self.longest = 0.0  # longest pause so far, in seconds
        self._began = 0.0
        self._collected = True  # no step has run since the last `collect`
        self._thresholds = gc.get_threshold()
        self.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        gc.callbacks.append(self._measure)

    def freeze(self) -> None:
        """Exclude all present objects from further collections. Called only while there are no requests."""
        gc.collect()
        gc.freeze()

    def close(self) -> None:
        """Restore the collector's former thresholds, and let it visit the frozen objects again."""
        gc.callbacks.remove(self._measure)
        gc.set_threshold(*self._thresholds)
        gc.unfreeze()

    def note_step(self) -> None:
        self._collected = False

    def collect(self) -> None:
        """Run a full collection if a step has run since the last one. Called only while the engine is idle."""
        if not self._collected:
            self._collected = True
            gc.collect()

    def _measure(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = time.perf_counter()
        else:
            self.longest = max(self.longest, time.perf_counter() - self._began)


TEND_MILLISECONDS = 5  # longest wait of an idle engine while the disk tier has work


class EngineProcess:
    """Owns the core and the ZeroMQ socket of an engine process, and runs the process's loop.

    The engine tells workers apart by the ZeroMQ identity of their sockets. A worker has a new identity after each reconnection.
    """

    def __init__(self, core: Core, endpoint: str) -> None:
        self._core = core
        self._info = core.info()
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a send to a worker that has disconnected raises an error
        self._socket.setsockopt(zmq.SNDHWM, SEND_QUEUE)
        self._socket.setsockopt(zmq.RCVHWM, 0)  # receive without a limit: the scheduler's queue has the limit
        self._socket.setsockopt(zmq.LINGER, 200)  # milliseconds to send the last messages after a close
        self._endpoint = endpoint
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            path = endpoint.removeprefix("ipc://")
            raise ConfigError(f"the engine's socket {path} cannot be made: {error}; set TMPDIR to another folder") from error
        self._workers: dict[bytes, str] = {}  # identity -> name
        self._lost: set[bytes] = set()  # a send to them failed; they are forgotten before the next step
        self._dropped: set[bytes] = set()  # they did not read; they are told to connect again once they do
        self._owners: dict[str, bytes] = {}  # running or waiting request -> identity of the worker that submitted it
        self._heartbeat_at = 0.0
        self._told_step = -1  # the step counter when the supervisor last heard of us
        self._served = False  # whether the process has reported SERVED to the supervisor
        self._preparing = True  # until the core has nothing left to do for later steps
        self._stopping = False
        self._pauses = CollectorPauses()

    def stop(self) -> None:
        """Make `run` return after the current iteration. Safe to call in a signal handler."""
        self._stopping = True

    def run(self) -> None:
        """Run the loop until `stop` is called."""
        was_busy = False
        while not self._stopping:
            self._core.tend()
            if not self._core.has_work and not self._prepare():
                self._wait()
            self._read()
            while self._lost:
                self._forget(self._lost.pop())
            # Heartbeats are also sent when work begins, since the first step may be long, and when it ends: workers judge an
            # engine that has work by its steps, and an idle engine by its heartbeats.
            if time.monotonic() >= self._heartbeat_at or self._core.has_work != was_busy:
                self._send_heartbeats()
            was_busy = self._core.has_work
            if was_busy:
                self._send_events(self._core.step())
                self._report_served()
                self._pauses.note_step()
                if not self._core.has_work:
                    self._send_heartbeats()
                    was_busy = False

    def close(self) -> None:
        self._pauses.close()
        self._socket.close()
        self._context.term()
        self._core.close()

    def _prepare(self) -> bool:
        """Do a piece of preparation for later steps. Returns False once nothing is left to prepare."""
        if self._preparing and not self._core.prepare():
            self._preparing = False
            self._pauses.freeze()
            self._heartbeat_at = 0.0  # a heartbeat now tells the workers that every later loop iteration is short
        return self._preparing

    def _wait(self) -> None:
        """Wait for a message from a worker, at most until the next heartbeat is due."""
        milliseconds = max(0, int((self._heartbeat_at - time.monotonic()) * 1000) + 1)
        if self._core.tends:
            milliseconds = min(milliseconds, TEND_MILLISECONDS)
        if not self._socket.poll(milliseconds):
            self._pauses.collect()

    def _read(self) -> None:
        """Handle the messages that have arrived from workers, up to the limits of one loop iteration. Runs no step."""
        num_bytes = 0
        for _ in range(READS_PER_STEP):
            if num_bytes >= READ_BYTES_PER_STEP:
                return
            try:
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            data = b"".join(frames)
            num_bytes += len(data)
            try:
                message = decode_worker_message(data)
            except TidegateError as error:  # a field of SamplingParams is out of range
                log.warning("refused a worker's message: %s", error.message)
            except msgspec.MsgspecError as error:
                log.warning("cannot decode a worker's message: %s", error)
            else:
                self._handle(identity, message)

    def _handle(self, identity: bytes, message: WorkerMessage) -> None:
        if isinstance(message, Hello):
            self._welcome(identity, message.worker)
        elif identity not in self._workers or identity in self._lost:
            log.debug("ignored a message of a worker that was dropped or sent no Hello")
        elif isinstance(message, Submit):
            self._submit(identity, message)
        elif isinstance(message, Abort):
            for request_id in message.request_ids:
                if self._owners.get(request_id) == identity:
                    self._core.abort(request_id)
        else:
            self._reset_cache(identity, message)

    def _welcome(self, identity: bytes, worker: str) -> None:
        for known, name in list(self._workers.items()):
            if name == worker:
                self._forget(known)
        self._dropped.discard(identity)
        self._workers[identity] = worker
        self._heartbeat_at = 0.0  # the worker gets a heartbeat before the next step, which may be long
        log.info("worker connected", extra={"worker": worker})
        self._send(identity, Welcome(self._info))

    def _submit(self, identity: bytes, submit: Submit) -> None:
        try:
            self._core.submit(submit)
        except TidegateError as error:
            refusal = TokenEvent(submit.request_id, [], FinishReason.ERROR, failure=RequestFailure.of(error))
            self._send(identity, StepEvents([refusal]))
        else:
            self._owners[submit.request_id] = identity

    def _reset_cache(self, identity: bytes, message: ResetCache) -> None:
        blocks = self._core.reset_cache(message.tiers)
        log.info("KV cache reset", extra={f"{tier}_blocks": num for tier, num in blocks.items()})
        self._send(identity, CacheReset(message.number, blocks))

    def _forget(self, identity: bytes) -> None:
        """End all requests of a worker, without any further event."""
        self._workers.pop(identity, None)
        requests = [request_id for request_id, owner in self._owners.items() if owner == identity]
        for request_id in requests:
            del self._owners[request_id]
        # The worker may submit requests with the same ids next, so its old requests must not produce another event.
        self._core.forget(requests)

    def _send_events(self, events: list[TokenEvent]) -> None:
        by_owner: dict[bytes, list[TokenEvent]] = {}
        for event in events:
            owner = self._owners.get(event.request_id) if event.finish is None else self._owners.pop(event.request_id, None)
            if owner is not None:
                by_owner.setdefault(owner, []).append(event)
        for identity, owned in by_owner.items():
            self._send(identity, StepEvents(owned))

    def _report_served(self) -> None:
        """Report SERVED to the supervisor after the first committed step. A later step may crash before the next heartbeat."""
        if not self._served and self._core.num_committed_steps > 0:
            self._served = True
            lifeline.tell(lifeline.SERVED)

    def _send_heartbeats(self) -> None:
        self._heartbeat_at = time.monotonic() + HEARTBEAT_SECONDS
        self._keep_bound()
        self._core.keep_costs()
        stats = msgspec.structs.replace(self._core.stats(), gc_pause_seconds=self._pauses.longest)
        heartbeat = Heartbeat(stats, self._preparing)
        if not self._core.has_work or heartbeat.stats.step != self._told_step:
            self._told_step = heartbeat.stats.step
            lifeline.tell(lifeline.ALIVE)
        for identity in list(self._workers):
            self._send(identity, heartbeat)
        for identity in list(self._dropped):
            # The worker has sent no Hello before this Welcome, so the Welcome tells it to connect again.
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
        """Send a message to a connected worker. If it cannot be sent, drop the worker."""
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
        """Send a message without blocking. Returns "sent", "full" (the worker does not read) or "gone" (it has disconnected)."""
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
    startup.share_cpus()
    clock = startup.StartupClock(startup.process_seconds(), report=lambda: lifeline.tell(lifeline.ALIVE))
    try:
        core = build_core(start.config, clock)
        process = EngineProcess(core, start.endpoint)
    except (ConfigError, CheckpointError) as error:
        log.error(error.message)
        sys.exit(EXIT_BAD_SETTINGS)
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
