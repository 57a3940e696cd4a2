"""Cancels the work for a request as soon as the client of the request disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from engine.errors import Aborted

T = TypeVar("T")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, and return its result. If `receive` reports a disconnect first, cancel `work` and raise Aborted.

    The body of the request must have been read. The watcher can run only while this task is suspended inside `work`, so its
    cancellation always hits `work` and never what follows it.
    """
    task = asyncio.current_task()
    has_left = False

    async def watch() -> None:
        nonlocal has_left
        while (await receive())["type"] != "http.disconnect":
            pass
        has_left = True
        if task is not None:
            task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and task is not None and task.uncancel() == 0:
            raise Aborted("the client left") from None
        raise
    finally:
        watcher.cancel()
