"""The metrics of each API worker in files, so that whichever worker is scraped answers for all of them.

A process whose files cannot be written keeps its metrics in memory alone, and its log names the folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from server.metrics.number_file import RESERVED_BYTES, NumberFile

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
FAILED = ("tidegate_requests_failed", "Requests that ended with an error, by error code.", ["transport", "code"])
DROPPED = (
    "tidegate_log_lines_dropped",
    "Log lines dropped because standard error was not read, or failed.",
    ["process"],
)
_KINDS = ("counter", "histogram", "gauge_livesum")
_READ_ATTEMPTS = 5

log = logging.getLogger("tidegate.metrics")


class ProcessFiles:
    """Keeps the metric files of this process.

    After the first error the files are removed, since other workers must not see half of the metrics.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.lock = threading.RLock()
        self._paths = {kind: folder / f"{kind}_{os.getpid()}.db" for kind in _KINDS}
        self._files: dict[str, NumberFile] = {}
        try:
            for kind, path in self._paths.items():
                self._files[kind] = NumberFile(path)
        except OSError as error:
            self._give_up(error)

    def find(self, kind: str, key: str) -> tuple[NumberFile, int] | None:
        """Return the file and position of the number of `key`, or None if this process has no files."""
        try:
            with self.lock:
                file = self._files.get(kind)
                return None if file is None else (file, file.position(key))
        except OSError as error:
            self._give_up(error)
            return None

    def publish(self) -> None:
        """Write all changes to this process's files, where other processes read them."""
        try:
            with self.lock:
                for file in self._files.values():
                    file.publish()
        except OSError as error:
            self._give_up(error)

    def others(self) -> Iterable[Metric]:
        """Return the metrics of all other processes, dead ones included, from their files."""
        own = set(self._paths.values())
        for attempt in range(_READ_ATTEMPTS):
            files = [str(path) for path in self._folder.glob("*.db") if path not in own]
            try:
                merged: Iterable[Metric] = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
                return merged
            except FileNotFoundError:  # another process has removed its files meanwhile
                if attempt == _READ_ATTEMPTS - 1:
                    raise
        return []

    def _give_up(self, error: OSError) -> None:
        with self.lock:
            files, self._files = self._files, {}
            for file in files.values():
                file.close()
            for path in self._paths.values():
                with contextlib.suppress(OSError):  # the file may be missing, or its file system read-only
                    path.unlink()
        # The lock is free here, so that other threads count on while this one logs.
        log.warning(
            "%s cannot be written (%s): this process keeps its metrics in memory. Other API workers do not show them, and they "
            "start again from 0 if the process restarts. To share them, free space there or set TMPDIR to a folder with at least "
            "%d KiB free for each API worker, and restart the server",
            self._folder,
            error.strerror,
            len(_KINDS) * RESERVED_BYTES // 1024,
        )


def value_class(files: ProcessFiles) -> type:
    """Return a class for `prometheus_client.values.ValueClass` whose objects keep a number in memory and set it in `files`."""

    class FileValue:
        """One number of a metric, with the methods that prometheus_client calls."""

        def __init__(
            self,
            typ: str,
            metric_name: str,
            name: str,
            labelnames: list[str],
            labelvalues: list[str],
            help_text: str,
            multiprocess_mode: str = "",
            **_: Any,
        ) -> None:
            kind = f"{typ}_{multiprocess_mode}" if typ == "gauge" else typ
            self._place = files.find(kind, mmap_key(metric_name, name, labelnames, labelvalues, help_text))
            self._value = 0.0 if self._place is None else self._place[0].get(self._place[1])

        def inc(self, amount: float) -> None:
            with files.lock:
                self._value += amount
                if self._place is not None:
                    file, position = self._place
                    file.set(position, self._value)

        def get(self) -> float:
            return self._value

        def get_exemplar(self) -> None:
            return None

    return FileValue


class AllProcesses(Collector):
    """Collects the sums of the metrics of all processes: this process's from memory, the others' from their files."""

    def __init__(self, own: CollectorRegistry, files: ProcessFiles) -> None:
        self._own = own
        self._files = files

    def collect(self) -> Iterable[Metric]:
        families: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
        heads: dict[str, Metric] = {}
        for family in (*self._own.collect(), *self._files.others()):
            heads.setdefault(family.name, family)
            sums = families.setdefault(family.name, {})
            for sample in family.samples:
                key = sample.name, tuple(sorted(sample.labels.items()))
                sums[key] = sums.get(key, 0.0) + sample.value
        for name, sums in families.items():
            summed = Metric(name, heads[name].documentation, heads[name].type)
            for (sample_name, labels), value in sums.items():
                summed.add_sample(sample_name, dict(labels), value)
            yield summed
