"""Writes the supervisor's part of the metric files: the requests of dead workers, and the supervisor's dropped log lines."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import mark_process_dead

from server.metrics.number_file import NumberFile
from server.metrics.shared_files import DROPPED, FAILED, FOLDER_VARIABLE

log = logging.getLogger("tidegate.metrics")


def worker_died(pid: int) -> None:
    """The supervisor calls this when a worker is dead. The requests that the worker was running count as failed.

    A folder that cannot be used, or that is deleted meanwhile, is logged and costs these numbers alone.
    """
    folder = Path(os.environ[FOLDER_VARIABLE])
    try:
        lost = _running_requests(folder / f"gauge_livesum_{pid}.db")
        mark_process_dead(pid)  # type: ignore[no-untyped-call]
        if lost:
            _count_failed(folder / f"counter_{pid}.db", lost)
    except OSError as error:
        log.warning("%s cannot be used (%s): /metrics lacks the requests that a dead worker ran", folder, error.strerror)


class SupervisorDrops:
    """Counts the supervisor's dropped log lines in a file that the workers read at a scrape. Give `add` to `logs.on_dropped`."""

    def __init__(self) -> None:
        self._key = _counter_key(*DROPPED, ["supervisor"])
        self._path: Path | None = Path(os.environ[FOLDER_VARIABLE]) / f"counter_{os.getpid()}.db"
        self._file: NumberFile | None = None
        self._total = 0

    def add(self, number: int) -> None:
        """Count `number` lines. An error of the file is not logged, since the log itself reports the dropped lines."""
        self._total += number
        if self._path is None:
            return
        try:
            self._file = self._file or NumberFile(self._path)
            self._file.set(self._file.position(self._key), self._total)
            self._file.publish()
        except OSError:
            self._path = None


def _count_failed(file: Path, lost: dict[str, float]) -> None:
    """Add the requests in `lost`, by transport, to the failed requests of a dead worker. Raises OSError."""
    with contextlib.closing(NumberFile(file)) as counters:
        for transport, count in lost.items():
            position = counters.position(_counter_key(*FAILED, [transport, "worker_died"]))
            counters.set(position, counters.get(position) + count)
        counters.publish()


def _counter_key(name: str, text: str, labels: list[str], values: list[str]) -> str:
    key: str = mmap_key(name, f"{name}_total", labels, values, text)
    return key


def _running_requests(file: Path) -> dict[str, float]:
    """Read a worker's file, and return its number of running requests for each transport."""
    if not file.is_file():
        return {}
    lost = {}
    for key, value, *_ in MmapedDict.read_all_values_from_file(str(file)):  # type: ignore[no-untyped-call]
        metric, _, labels, _ = json.loads(key)
        if metric == "tidegate_requests_running" and value > 0:
            lost[labels["transport"]] = value
    return lost
