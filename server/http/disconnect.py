"""Work that ends when its client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from engine.errors import Aborted

T = TypeVar("T")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, cancelling it as soon as `receive` tells of a disconnect; then raise Aborted.

    The request's body must have been read. The watcher can run only while this task is suspended inside `work`, so a
    cancellation it asks for always lands there and nowhere later.
    """
    task = asyncio.current_task()
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        if task is not None:
            task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if gone and task is not None and task.uncancel() == 0:
            raise Aborted("the client went away") from None
        raise
    finally:
        watcher.cancel()
