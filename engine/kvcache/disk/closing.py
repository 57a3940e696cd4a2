"""Closing: the last work of a disk store. It erases the records that must not be found after a restart, in a bounded time."""

from __future__ import annotations

import threading
from collections.abc import Callable

from engine.kvcache.disk.index import SlotIndex
from engine.kvcache.disk.record_files import RecordFiles
from engine.kvcache.disk.upkeep import Upkeep


def finish(upkeep: Upkeep, index: SlotIndex, files: RecordFiles, seconds: float, clock: Callable[[], float]) -> bool | None:
    """Look for the forgotten records that the scan has not reached, and erase all that are known.

    The threads of Workers have ended. The work has a thread of its own, since a call into a disk that hangs never returns.
    Returns whether everything is erased, or None if that thread still runs after `seconds`, and uses the files.
    """
    if not (index.is_seeking or index.doomed):
        return True
    until = clock() + 0.9 * seconds  # the rest is for the call that runs then: if it returns, the folder can be released
    all_erased: list[bool] = []

    def work() -> None:
        is_found = upkeep.finish_scan(lambda: clock() >= until)
        is_erased = files.erase_all(index.doomed, lambda: clock() >= until)
        all_erased.append(is_found and is_erased)

    thread = threading.Thread(target=work, name="disk-closing", daemon=True)
    thread.start()
    thread.join(seconds)
    return None if thread.is_alive() else all_erased == [True]
