"""Learnt costs: what an engine has learnt of its step times outlives it, as a cost file in the folder `batching.cost_folder`.

Each (device, model, precision) has a file of its own there. An engine reads it at its start, unless the operator names a cost
file, and writes it every KEEP_SECONDS and when it stops. The operator's own file is never written. A learnt file that cannot be
read, or belongs to something else, is reported in the log and ignored, and the next one replaces it: nobody asked for it by name.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

from engine.errors import ConfigError
from engine.scheduler.cost_file import CostKey, load_costs, save_costs
from engine.scheduler.cost_table import CostTable
from engine.scheduler.step_cost import StepCost

SETTING = "batching.cost_folder"
KEEP_SECONDS = 300.0  # an engine that dies loses what it learnt within this time
CLOSE_SECONDS = 2.0  # a disk that takes longer does not delay the end of the engine

log = logging.getLogger(__name__)


def check_folder(path: str, setting: str = SETTING) -> None:
    """Make the folder that is the value of `setting`, if it is missing. Raises ConfigError if it cannot be made or written to."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{setting} is {path!r}, which is no folder and cannot be made ({error.strerror}): name a folder, or unset the "
            "setting",
            param=setting,
        ) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"{setting} is {path!r}, which cannot be written to: allow it, or name another folder", param=setting)


class LearntCosts:
    """The file of learnt costs of one (device, model, precision) in `folder`. Raises ConfigError if the folder cannot be used."""

    def __init__(self, folder: str, key: CostKey) -> None:
        check_folder(folder)
        self.path = Path(folder) / _file_name(key)
        self._key = key

    def read(self) -> CostTable | None:
        """Return the learnt costs. Returns None if there are none, or if the file cannot be used, which is logged."""
        if not self.path.exists():
            return None
        try:
            file = load_costs(self.path, setting=SETTING)
        except ConfigError as error:
            self._log_ignored(error.message)
            return None
        if file.key != self._key:
            self._log_ignored(f"it belongs to {tuple(file.key)}, and this engine is {tuple(self._key)}")
            return None
        log.info("learnt step costs read", extra={"path": str(self.path)})
        return file.table

    def write(self, table: CostTable) -> None:
        """Write the costs. A failure is logged: the engine serves without the file."""
        try:
            save_costs(self.path, self._key, f"learnt while serving, until {date.today().isoformat()}", table)
        except OSError as error:
            log.warning("learnt step costs cannot be written", extra={"path": str(self.path), "why": error.strerror})
        else:
            log.debug("learnt step costs written", extra={"path": str(self.path)})

    def _log_ignored(self, why: str) -> None:
        log.warning("learnt step costs are ignored", extra={"path": str(self.path), "why": why})


class CostKeeper:
    """Writes what `cost` has learnt to `file`, every KEEP_SECONDS of `clock` and at the end."""

    def __init__(self, cost: StepCost, file: LearntCosts, clock: Callable[[], float] = time.monotonic) -> None:
        self._cost = cost
        self._file = file
        self._clock = clock
        self._due_at = clock() + KEEP_SECONDS
        self._writer: threading.Thread | None = None

    def keep(self) -> None:
        """Begin to write if it is time. A thread writes: a slow disk must not delay the next step."""
        if self._clock() < self._due_at or (self._writer is not None and self._writer.is_alive()):
            return
        self._due_at = self._clock() + KEEP_SECONDS
        table = self._cost.learnt
        if table is not None:
            self._writer = threading.Thread(target=self._file.write, args=(table,), name="learnt costs", daemon=True)
            self._writer.start()

    def close(self) -> None:
        """Write what was learnt last. Gives up, and says so in the log, after CLOSE_SECONDS."""
        if self._writer is not None:
            self._writer.join(CLOSE_SECONDS)
        if self._writer is None or not self._writer.is_alive():
            self._due_at = self._clock()
            self.keep()
        if self._writer is not None:
            self._writer.join(CLOSE_SECONDS)
            if self._writer.is_alive():
                log.warning("learnt step costs are not written in time", extra={"path": str(self._file.path)})


def _file_name(key: CostKey) -> str:
    """Return a name that people recognise. The digest keeps keys apart whose letters and digits are the same."""
    words = "-".join(re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-.")[:40] for part in key)
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()
    return f"{words}-{digest[:8]}.json"
