"""Writes the supervisor's part of the metric files: the requests of dead workers, and the supervisor's dropped log lines."""

from __future__ import annotations

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
    """Count the requests that a dead worker was running as failed. The supervisor calls this after the worker's death."""
    folder = Path(os.environ[FOLDER_VARIABLE])
    lost = _running_requests(folder / f"gauge_livesum_{pid}.db")
    mark_process_dead(pid)  # type: ignore[no-untyped-call]
    if not lost:
        return
    try:
        counters = NumberFile(folder / f"counter_{pid}.db")
        for transport, count in lost.items():
            position = counters.position(_counter_key(*FAILED, [transport, "worker_died"]))
            counters.set(position, counters.get(position) + count)
        counters.publish()
        counters.close()
    except OSError as error:
        log.warning("%s cannot be written (%s): /metrics lacks the requests that a dead worker ran", folder, error.strerror)


class SupervisorDrops:
    """Counts the supervisor's dropped log lines in a file that the workers read at a scrape. Give `add` to `logs.on_dropped`."""

    def __init__(self) -> None:
        self._key = _counter_key(*DROPPED, ["supervisor"])
        self._path: Path | None = Path(os.environ[FOLDER_VARIABLE]) / f"counter_{os.getpid()}.db"
        self._file: NumberFile | None = None
        self._total = 0

    def add(self, number: int) -> None:
        """Count `number` more dropped log lines.

        An error is not logged, since a thread that is logging calls this method. The log itself also reports the number.
        """
        self._total += number
        if self._path is None:
            return
        try:
            self._file = self._file or NumberFile(self._path)
            self._file.set(self._file.position(self._key), self._total)
            self._file.publish()
        except OSError:
            self._path = None


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
