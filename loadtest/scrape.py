"""Reads the metrics of a Tidegate server once a second while a load runs: the limits of its steps, and what runs and waits."""

from __future__ import annotations

import http.client
import threading
import time
import urllib.error
import urllib.request
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from loadtest.spec import LoadError

PERIOD = 1.0
_TIMEOUT = 5.0
LIMITS = {
    "sequences limit": "tidegate_engine_batch_sequences_limit",
    "tokens limit": "tidegate_engine_batch_tokens_limit",
    "chunk limit": "tidegate_engine_batch_chunk_limit",
}
STATE = {"running": "tidegate_engine_requests_running", "waiting": "tidegate_engine_requests_waiting"}
# Series with one label: their samples get the label's value behind the prefix.
CHANGES, POLICY = "changes: ", "policy: "
_LABELLED = {"tidegate_engine_limit_changes_total": (CHANGES, "reason"), "tidegate_engine_batching_policy": (POLICY, "policy")}
_SERIES = {name: label for label, name in {**LIMITS, **STATE}.items()}


class Sample(NamedTuple):
    at: float  # seconds on the clock of time.perf_counter
    values: dict[str, float]  # by label; a series that the server does not have is missing


def read(url: str) -> dict[str, float]:
    """Return the values of the known series at `url`. Raises OSError or ValueError."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            text = response.read().decode()
    except urllib.error.HTTPError as error:
        error.close()
        raise
    except http.client.HTTPException as error:
        raise OSError(f"no answer in HTTP: {type(error).__name__}") from None
    return values_of(text)


def values_of(text: str) -> dict[str, float]:
    """Return the values of the known series in the text of a server's metrics, by our names. Raises ValueError."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in _SERIES:
                found[_SERIES[sample.name]] = sample.value
            elif sample.name in _LABELLED:
                prefix, label = _LABELLED[sample.name]
                found[prefix + sample.labels[label]] = sample.value
    return found


def check(url: str, *, asked: bool) -> str | None:
    """Return `url` if a Tidegate server has metrics there. Otherwise return None, or raise LoadError if the user gave the URL."""
    try:
        found = read(url)
    except (OSError, ValueError) as error:
        found, reason = {}, str(error)
    else:
        reason = "it has no series of Tidegate"
    if found:
        return url
    if asked:
        raise LoadError(f"--metrics {url} cannot be read: {reason}")
    return None


class Scraper:
    """Reads metrics in a thread from `start` to `stop`. A read that fails is counted, and leaves a hole in the samples."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.samples: list[Sample] = []
        self.failures = 0

    def __enter__(self) -> Scraper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(PERIOD):
            at = time.perf_counter()
            try:
                self.samples.append(Sample(at, read(self._url)))
            except (OSError, ValueError):
                self.failures += 1
