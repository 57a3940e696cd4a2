"""Workers: threads that do the reads and writes of the disk tier, and its upkeep while nothing else waits.

Reads go first, since requests wait for them; then writes; then upkeep. One thread at least is always left for reads and upkeep,
however slow writes are (with a single thread, there is none to leave).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from engine.errors import InternalError
from engine.kvcache.disk.outcome import Outcome


class Kind(StrEnum):
    READ = "read"
    WRITE = "write"


@dataclass(frozen=True, slots=True)
class Move:
    """A read or write of the record `digest` in `slot`."""

    kind: Kind
    slot: int
    digest: bytes
    run: Callable[[], Outcome]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a move ended. `seconds` is its duration without the time in the queue."""

    kind: Kind
    slot: int
    digest: bytes
    outcome: Outcome
    seconds: float


Upkeep = Callable[[], bool]  # does a short piece of work; returns whether there is more of it


class Workers:
    """`poll` gives back each submitted move once. No method but `close` waits for the disk."""

    def __init__(self, num_threads: int, max_reads: int, max_writes: int, clock: Callable[[], float]) -> None:
        """`max_reads` and `max_writes` bound the moves that wait."""
        self._clock = clock
        self._max = {Kind.READ: max_reads, Kind.WRITE: max_writes}
        self._queues: dict[Kind, deque[Move]] = {Kind.READ: deque(), Kind.WRITE: deque()}
        self._max_writing = max(1, num_threads - 1)
        self._num_writing = 0
        self._upkeep: deque[Upkeep] = deque()
        self._is_keeping = False
        self._alone: Upkeep | None = None
        self._num_running = 0
        self._reading_since: dict[int, float] = {}  # by thread
        self._ended: deque[Ended] = deque()
        self._is_closing = False
        self._is_refusing = False
        self._has_crashed = False
        self._has_kept = False  # a piece of upkeep ended since the last `poll`
        lock = threading.Lock()
        self._work = threading.Condition(lock)
        self._news = threading.Condition(lock)
        self._threads = [threading.Thread(target=self._run, name=f"disk-{i}", daemon=True) for i in range(num_threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, move: Move) -> bool:
        """Queue a move. Returns False if the queue is full; the move is then not given back."""
        queue = self._queues[move.kind]
        with self._work:
            if self._is_refusing:
                self._end(move, Outcome.OFF, 0.0)
                return True
            if len(queue) >= self._max[move.kind] or self._is_closing:
                return False
            queue.append(move)
            self._work.notify()
            return True

    def keep_up(self, upkeep: Upkeep) -> None:
        """Queue a piece of upkeep. One thread at a time does upkeep."""
        with self._work:
            self._upkeep.append(upkeep)
            self._work.notify()

    def run_alone(self, work: Upkeep) -> None:
        """Queue a piece of upkeep that runs before everything else, once no thread does anything. One at a time."""
        with self._work:
            self._alone = work
            self._work.notify()

    def refuse(self, is_refusing: bool) -> None:
        """End the moves that wait, and those of later calls of `submit`, with OFF; or stop doing so."""
        with self._work:
            self._is_refusing = is_refusing
            for queue in self._queues.values() if is_refusing else ():
                while queue:
                    self._end(queue.popleft(), Outcome.OFF, 0.0)

    def poll(self, seconds: float = 0.0) -> list[Ended]:
        """Return the moves that ended since the last call, in the order of their ends.

        If there is none, and no piece of upkeep ended since, waits up to `seconds` for one or the other. Raises InternalError
        if a thread ended by an exception; the log has it.
        """
        with self._news:
            if not self._ended and not self._has_kept and seconds > 0.0:
                self._news.wait(seconds)
            self._has_kept = False
            if self._has_crashed:
                raise InternalError("a thread of the disk tier ended by an exception: see the log above")
            ended = list(self._ended)
            self._ended.clear()
            return ended

    def longest_read(self) -> float:
        """Return for how many seconds the oldest running read has been running."""
        with self._work:
            return self._clock() - min(self._reading_since.values()) if self._reading_since else 0.0

    def close(self, seconds: float) -> bool:
        """Do what is queued, but no further upkeep, and end the threads. Returns False if that takes longer than `seconds`."""
        with self._work:
            self._is_closing = True
            self._upkeep.clear()
            self._alone = None
            self._work.notify_all()
        until = self._clock() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - self._clock()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        while (work := self._next()) is not None:
            if isinstance(work, Move):
                self._move(work)
            else:
                self._keep(work)

    def _next(self) -> Move | Upkeep | None:
        """Wait for work and return it. Returns None when the thread shall end."""
        with self._work:
            while True:
                work = self._take()
                if work is not None:
                    self._num_running += 1
                    return work
                if self._is_closing and not any(self._queues.values()):
                    self._work.notify_all()
                    return None
                self._work.wait()

    def _take(self) -> Move | Upkeep | None:
        if self._alone is not None:
            if self._num_running:
                return None
            work, self._alone = self._alone, None
            self._is_keeping = True
            return work
        if self._queues[Kind.READ]:
            self._reading_since[threading.get_ident()] = self._clock()
            return self._queues[Kind.READ].popleft()
        if self._queues[Kind.WRITE] and self._num_writing < self._max_writing:
            self._num_writing += 1
            return self._queues[Kind.WRITE].popleft()
        if self._upkeep and not self._is_keeping:
            self._is_keeping = True
            return self._upkeep.popleft()
        return None

    def _move(self, move: Move) -> None:
        began = self._clock()
        outcome = Outcome.CRASHED
        try:
            outcome = move.run()
        finally:  # whatever ends this thread, nobody waits for the move forever
            with self._work:
                self._num_running -= 1
                self._num_writing -= move.kind is Kind.WRITE
                self._reading_since.pop(threading.get_ident(), None)
                self._has_crashed |= outcome is Outcome.CRASHED
                self._end(move, outcome, self._clock() - began)
                self._work.notify_all()

    def _end(self, move: Move, outcome: Outcome, seconds: float) -> None:
        self._ended.append(Ended(move.kind, move.slot, move.digest, outcome, seconds))
        self._news.notify_all()

    def _keep(self, upkeep: Upkeep) -> None:
        is_more: bool | None = None
        try:
            is_more = upkeep()
        finally:
            with self._work:
                self._has_crashed |= is_more is None
                self._num_running -= 1
                self._is_keeping = False
                self._has_kept = True
                if is_more and not self._is_closing:
                    self._upkeep.append(upkeep)
                self._news.notify_all()
                self._work.notify_all()
