"""Runs a part of a load in a process of its own, so that neither the display nor the reports delay a request.

The parent reads one Report after the other from a pipe, and says when to start and when to stop.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import signal
import time
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import msgspec
import uvloop

from loadtest.clients import build_client
from loadtest.drive import Driver, Share
from loadtest.record import Record
from loadtest.spec import Load, LoadError, Target

REPORT_PERIOD = 0.5


class Start(msgspec.Struct, frozen=True):
    """What a process is to do."""

    load: Load
    target: Target
    number: int
    of: int


class Go(msgspec.Struct, frozen=True):
    zero: float  # start of the measured window, on the clock of time.perf_counter, which all processes share on Linux


class Report(msgspec.Struct, frozen=True):
    """What has happened since the report before."""

    records: list[Record] = []
    lags: list[float] = []  # seconds by which the event loop ran late
    sent: int = 0  # requests since the start
    running: int = 0
    cpu_s: float = 0.0  # of this process since Go
    ready: bool = False  # the process waits for Go
    done: bool = False  # this is the last report
    problem: str = ""  # why the process cannot do its part


class LoadProcess:
    """The parent's end of one process."""

    def __init__(self, start: Start) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process: SpawnProcess = context.Process(target=run, args=(theirs, msgspec.msgpack.encode(start)))
        self._process.start()
        theirs.close()
        self._decoder = msgspec.msgpack.Decoder(Report)
        self.done = False

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def read(self) -> Report:
        """Return the next report. A process that has died gives a last report with its problem."""
        try:
            report = self._decoder.decode(self.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            self._process.join()
            report = Report(done=True, problem=f"a process of the load test ended with code {self._process.exitcode}")
        self.done = report.done
        return report

    def go(self, zero: float) -> None:
        self.pipe.send_bytes(msgspec.msgpack.encode(Go(zero)))

    def stop(self) -> None:
        """Ask the process to end. It records the requests that are under way as unfinished."""
        if not self.done:
            self.pipe.send_bytes(b"")

    def close(self) -> None:
        if not self.done:
            self._process.kill()
        self._process.join()
        self.pipe.close()


def run(pipe: Connection, message: bytes) -> None:
    """Do one process's part of a load. This is the main function of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the parent asks this one to stop
    start = msgspec.msgpack.decode(message, type=Start)
    try:
        uvloop.run(_serve(pipe, start))
    except LoadError as error:
        _send(pipe, Report(done=True, problem=str(error)))


async def _serve(pipe: Connection, start: Start) -> None:
    client = build_client(start.target, start.load)
    try:
        driver = Driver(start.load, start.target, client, Share(start.number, start.of))
        _send(pipe, Report(ready=True))
        message = await asyncio.to_thread(pipe.recv_bytes)
        if message:
            await _drive(pipe, driver, msgspec.msgpack.decode(message, type=Go).zero)
        else:
            _send(pipe, Report(done=True))
    finally:
        await client.close()


async def _drive(pipe: Connection, driver: Driver, zero: float) -> None:
    gc.freeze()  # a full collection would look at every object of the plan, and stop all streams meanwhile
    cpu = time.process_time()
    loop = asyncio.get_running_loop()
    loop.add_reader(pipe.fileno(), driver.stop)  # the parent sends nothing but the wish to stop, and its death ends the pipe
    running = asyncio.create_task(driver.run(zero))
    while not running.done():
        await asyncio.wait({running}, timeout=REPORT_PERIOD)
        _send(pipe, _report(driver, cpu))
    loop.remove_reader(pipe.fileno())
    await running
    _send(pipe, _report(driver, cpu, done=True))


def _report(driver: Driver, cpu: float, *, done: bool = False) -> Report:
    records, driver.records = driver.records, []
    lags, driver.lags = driver.lags, []
    used = time.process_time() - cpu
    return Report(records, lags, sent=driver.sent, running=driver.running, cpu_s=used, done=done)


def _send(pipe: Connection, report: Report) -> None:
    pipe.send_bytes(msgspec.msgpack.encode(report))
