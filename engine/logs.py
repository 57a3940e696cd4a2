"""Logs to standard error, alike in every process: a readable line at a terminal, one JSON object a line otherwise.

`log.info("engine ready", extra={"blocks": 512})`: the keys of `extra` become keys of the JSON object, or key=value at the end of
the readable line. Prompts and outputs must not be logged.

A thread of its own writes the lines, since a pipe that nobody reads blocks its writer. Lines wait for the thread in a bounded
queue. A line that does not fit, or cannot be written, is dropped and counted. The log reports the count at the place of the
dropped lines.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Literal

import msgspec

MAX_QUEUED_BYTES = 1 << 20  # largest total size of the log lines that wait for the writer thread
MAX_PRINTED_BYTES = 64 << 10  # bytes kept of text printed to sys.stderr whose line is not complete yet
FLUSH_SECONDS = 1.0  # longest time that an ending process waits until its last log lines are written

_PLAIN = re.compile(r"[^\s,;=\"']+")

LogFormat = Literal["auto", "human", "json"]
_RESERVED = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


def set_up(level: str, form: LogFormat, process: str) -> None:
    """Send all logs of this process to standard error, marked with the name `process`.

    Warnings, uncaught exceptions and text that Python code prints to `sys.stderr` become log lines too. A library in C that
    writes to descriptor 2 by itself is not covered.
    """
    human = form == "human" or (form == "auto" and sys.stderr is not None and sys.stderr.isatty())
    formatter = HumanFormatter(process) if human else JsonFormatter(process)
    # Python leaves sys.__stderr__ empty where the process began without a standard error. Descriptor 2 may then be anything.
    handler = logging.NullHandler() if sys.__stderr__ is None else QueueHandler(LineWriter(2, formatter), formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.getLogger("grpc._cython").setLevel(logging.WARNING)  # at debug level, this logger logs every poll
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread
    sys.stderr = _PrintedLines()


def on_dropped(callback: Callable[[int], None]) -> None:
    """Call `callback(number)` for log lines that were dropped: first for all until now, then soon after lines are dropped.

    A thread of its own calls `callback` and holds no lock meanwhile, so `callback` may wait for a lock, and may log.
    """
    for handler in logging.getLogger().handlers:
        if isinstance(handler, QueueHandler):
            handler.writer.on_dropped(callback)


def num_dropped() -> int:
    """Return how many log lines of this process were dropped since it began."""
    return sum(handler.writer.num_dropped for handler in logging.getLogger().handlers if isinstance(handler, QueueHandler))


class LineWriter:
    """Writes lines to a descriptor in a thread of its own. `put` never blocks."""

    def __init__(self, fd: int, formatter: logging.Formatter) -> None:
        """Start the writer thread for descriptor `fd`. `formatter` formats the line that reports dropped lines."""
        self._fd = fd
        self._formatter = formatter
        lock = threading.RLock()  # a signal handler may log while its thread holds the lock
        self._changed = threading.Condition(lock)
        self._dropped = threading.Condition(lock)
        self._queue: deque[bytes | int] = deque()  # lines, and numbers of lines that were dropped at that place
        self._num_bytes = 0
        self._is_writing = False
        self.num_dropped = 0
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def put(self, line: bytes) -> None:
        with self._changed:
            if self._num_bytes + len(line) > MAX_QUEUED_BYTES:
                self._drop()
                return
            self._queue.append(line)
            self._num_bytes += len(line)
            self._changed.notify_all()

    def on_dropped(self, callback: Callable[[int], None]) -> None:
        threading.Thread(target=self._report_dropped, args=(callback,), name="log-dropped", daemon=True).start()

    def flush(self, seconds: float) -> bool:
        """Wait until all queued lines are written, but at most `seconds`. Returns True if all were written in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._is_writing, seconds)

    def _drop(self) -> None:
        if self._queue and isinstance(self._queue[-1], int):
            self._queue[-1] += 1
        else:
            self._queue.append(1)
            self._changed.notify_all()
        self._count_dropped()

    def _count_dropped(self) -> None:
        self.num_dropped += 1
        self._dropped.notify_all()

    def _report_dropped(self, callback: Callable[[int], None]) -> None:
        num_reported = 0
        while True:
            with self._dropped:
                while self.num_dropped == num_reported:
                    self._dropped.wait()
                number = self.num_dropped - num_reported
                num_reported += number
            callback(number)

    def _run(self) -> None:
        unreported = 0  # number of lines dropped since the last report
        while True:
            item = self._next()
            line = b"" if isinstance(item, int) else item
            unreported += item if isinstance(item, int) else 0
            is_written = self._write((self._report(unreported) if unreported else b"") + line)
            with self._changed:
                if is_written:
                    unreported = 0
                elif line:
                    unreported += 1
                    self._count_dropped()
                self._is_writing = False
                self._changed.notify_all()

    def _next(self) -> bytes | int:
        with self._changed:
            self._changed.wait_for(lambda: self._queue)
            self._is_writing = True
            item = self._queue.popleft()
            if isinstance(item, bytes):
                self._num_bytes -= len(item)
            return item

    def _report(self, number: int) -> bytes:
        text = f"{number} log line{'s were' if number > 1 else ' was'} dropped here: standard error was not read, or failed"
        return _encoded(self._formatter.format(_record(text, dropped_lines=number)))

    def _write(self, data: bytes) -> bool:
        """Write all of `data` to the descriptor, and wait while the reader does not read.

        Returns False if the write fails: the reader closed its end, or the disk is full.
        """
        while data:
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:  # another program that shares the descriptor made it non-blocking
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
            except OSError:
                return False
        return True


class QueueHandler(logging.Handler):
    """Formats each log record in the thread that logged it, and passes the line to a LineWriter, which writes it."""

    def __init__(self, writer: LineWriter, formatter: logging.Formatter) -> None:
        super().__init__()
        self.writer = writer
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except (TypeError, ValueError, KeyError, msgspec.MsgspecError) as error:  # the record's arguments do not fit its message
            where = f"{record.name}, {record.pathname}:{record.lineno}"
            line = self.format(_record(f"a log record of {where} cannot be formatted: {error!r}"))
        self.writer.put(_encoded(line))

    def flush(self) -> None:
        """Wait up to FLUSH_SECONDS until the queued lines are written. `logging` calls this when the process ends."""
        self.writer.flush(FLUSH_SECONDS)


class _PrintedLines(io.TextIOBase):
    """Stands in for `sys.stderr`: each line that is printed becomes a log line."""

    def __init__(self) -> None:
        self._rest = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                logging.getLogger("stderr").warning("%s", line)
        self._rest = self._rest[-MAX_PRINTED_BYTES:]
        return len(text)


class JsonFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **_extra(record),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields, enc_hook=str).decode()


class HumanFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        extra = "".join(f" {key}={_readable(value)}" for key, value in _extra(record).items())
        line = f"{clock} {self._process:<10} {level}{record.getMessage()}{extra}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _record(message: str, **extra: object) -> logging.LogRecord:
    return logging.makeLogRecord({"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "msg": message, **extra})


def _encoded(line: str) -> bytes:
    return line.encode(errors="backslashreplace") + b"\n"


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger("tidegate").critical("the process ends: %s", kind.__name__, exc_info=(kind, error, trace))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        name = args.thread.name if args.thread is not None else "unknown"
        where = (args.exc_type, args.exc_value, args.exc_traceback)
        logging.getLogger("tidegate").error("thread %s ends: %s", name, args.exc_type.__name__, exc_info=where)


def _extra(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _RESERVED}


def _readable(value: object) -> str:
    """Return `value` as text, in quotes if a reader of a key=value line could not tell where the text ends."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"


class ThrottledWarning:
    """Logs a warning that any client can cause, but at most once in `seconds`.

    `times` in the log line is the number of events since the previous line.
    """

    def __init__(self, log: logging.Logger, message: str, seconds: float = 10.0) -> None:
        self._log = log
        self._message = message
        self._seconds = seconds
        self._next_at = 0.0
        self._num_events = 0

    def __call__(self, **extra: object) -> None:
        self._num_events += 1
        now = time.monotonic()
        if now >= self._next_at:
            self._log.warning(self._message, extra={"times": self._num_events, **extra})
            self._next_at = now + self._seconds
            self._num_events = 0
