"""Runs the cases that a client's program gets on standard input, and prints what came of each as JSON.

Programs run in the environment of their client, with nothing of Tidegate on the path. Input: {"url", "model", "cases": [{"name",
"call", "arguments"}]}. Output: {name: result}. A call that raises gives {"error": ...}, with the exception as the client's user
would catch it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

ENDED = ("tidegate_requests_aborted_total{", "tidegate_requests_failed_total{")
Call = Callable[[dict[str, Any]], Any]


def run(calls: Callable[[str, str], dict[str, Call]]) -> None:
    """Run all cases. `calls(url, model)` returns the functions by name, each of which makes one kind of call."""
    job = json.load(sys.stdin)
    functions = calls(job["url"], job["model"])
    # Some clients print advice. A future keeps whatever the call raises.
    with contextlib.redirect_stdout(sys.stderr), ThreadPoolExecutor(1) as thread:
        futures = {case["name"]: thread.submit(functions[case["call"]], case["arguments"]) for case in job["cases"]}
    json.dump({name: _result(future) for name, future in futures.items()}, sys.stdout, default=str)


def _result(future: Any) -> Any:
    error = future.exception()
    return future.result() if error is None else {"error": describe(error)}


def describe(error: BaseException) -> dict[str, Any]:
    """Return the class of an exception with its bases, and the attributes that clients give to errors of a server."""
    classes = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(error).__mro__ if cls not in (object, BaseException)]
    found = {name: getattr(error, name, None) for name in ("status_code", "code", "param")}
    return {"classes": classes, **found, "message": str(error)}


def at_once(call: Call, many: Iterable[dict[str, Any]]) -> list[Any]:
    """Make a call for each of the arguments in `many`, all at the same time. Returns the results in order."""
    bodies = list(many)
    with ThreadPoolExecutor(len(bodies)) as threads:
        return list(threads.map(call, bodies))


def given_up(url: str, call: Callable[[], Any]) -> dict[str, Any]:
    """Make a call that must raise. Returns the exception, and how many requests the server ended because of it."""
    ended = Ended(url)
    with ThreadPoolExecutor(1) as thread:
        error = thread.submit(call).exception()
    return {"error": error and describe(error), "ended": ended.wait()}


class Ended:
    """Counts the requests that the server ended early, because their client had left or their time was over."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/metrics"
        self._before = self._total()

    def wait(self, seconds: float = 20.0) -> int:
        """Return how many requests the server has ended early since this object was made, once there is one."""
        until = time.monotonic() + seconds
        while (now := self._total()) == self._before and time.monotonic() < until:
            time.sleep(0.02)
        return round(now - self._before)

    def _total(self) -> float:
        with urllib.request.urlopen(self._url) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(ENDED))
