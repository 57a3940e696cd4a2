"""Metrics of an API worker: `tidegate_*`, in seconds, tokens and requests.

At every moment, requests started = finished + aborted + failed + running. `slo.py` has the metrics by SLO class.

A process that runs alone reports only its own metrics. If the supervisor has set PROMETHEUS_MULTIPROC_DIR, each worker also
writes its metrics to files in that folder (`shared_files.py`), and a scrape of any worker returns the metrics of all workers.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, values
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from engine.errors import Overloaded
from engine.slo import SloName
from server.engines.base import EngineHealth
from server.metrics.exposition import Exposition
from server.metrics.shared_files import DROPPED, FAILED, FOLDER_VARIABLE, AllProcesses, ProcessFiles, value_class
from server.metrics.slo import ClassMetrics, class_metrics

# The bucket bounds are vLLM's, so that dashboards made for vLLM can read the histograms.
_SECONDS = (0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_SHORT_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5)
_LONG_SECONDS = (20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
TTFT_BUCKETS = (*_SHORT_SECONDS, *_SECONDS, 160.0, 640.0, 2560.0)
ITL_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, *_SECONDS)
E2E_BUCKETS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, *_LONG_SECONDS)

FLUSH_SECONDS = 0.5  # while tokens arrive, token counts reach the registry at most this late


class TallyHistogram(Histogram):
    """A histogram that takes many observations at once, already counted by bucket."""

    def add(self, counts: list[int], total: float) -> None:
        """Add `counts[i]` observations to bucket i. The last bucket is +Inf. `total` is the sum of all observed values."""
        self._sum.inc(total)
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)


class _TokenTally:
    """Counts tokens in plain numbers until `flush` adds them to the metrics. A metric update for every token would cost more."""

    __slots__ = ("_flush_at", "_itl", "_itl_counts", "_itl_total", "_num_tokens", "_publish", "_tokens")

    def __init__(self, tokens: Counter, itl: TallyHistogram, publish: Callable[[], None]) -> None:
        self._tokens = tokens
        self._itl = itl
        self._publish = publish
        self._flush_at = 0.0
        self._num_tokens = 0
        self._itl_total = 0.0
        self._itl_counts = [0] * (len(ITL_BUCKETS) + 1)

    def first(self, num_tokens: int) -> None:
        """Count the first tokens of an output, which have no inter-token latency."""
        self._num_tokens += num_tokens

    def next(self, num_tokens: int, seconds: float, now: float) -> None:
        """Count tokens that arrived together, `seconds` after the previous tokens of the same output.

        The inter-token latency of each token is an equal share of `seconds`.
        """
        self._num_tokens += num_tokens
        self._itl_total += seconds
        self._itl_counts[bisect_left(ITL_BUCKETS, seconds / num_tokens)] += num_tokens
        if now > self._flush_at:
            self._flush_at = now + FLUSH_SECONDS
            self.flush()

    def flush(self) -> None:
        """Add the counts to the metrics, reset them, and publish all metrics to the other workers."""
        if self._num_tokens:
            self._tokens.inc(self._num_tokens)
            self._num_tokens = 0
        if any(self._itl_counts):
            self._itl.add(self._itl_counts, self._itl_total)
            self._itl_counts = [0] * (len(ITL_BUCKETS) + 1)
            self._itl_total = 0.0
        self._publish()


class RequestMeter:
    """Measures one request from `Metrics.begin` to the first call of `finished`, `aborted` or `failed`; later calls do nothing.

    A request with n outputs counts as one request. Its inter-token latencies are measured within each output.
    """

    __slots__ = ("_began", "_class", "_ended", "_latest", "_longest_gap", "_metrics", "_transport", "_ttft")

    def __init__(self, metrics: Metrics, transport: str, of_class: ClassMetrics, now: float) -> None:
        self._metrics = metrics
        self._class = of_class
        self._ttft = 0.0
        self._longest_gap = 0.0
        self._transport = transport
        self._began = now
        self._ended = False
        self._latest: dict[int, float] = {}  # output index -> time of its latest tokens

    def prompt(self, num_tokens: int, num_cached: int) -> None:
        """Record the request's prompt, of which `num_cached` tokens were found in the cache. Call it once for each request."""
        self._metrics.prompt_tokens.inc(num_tokens)
        self._metrics.cached_tokens.inc(num_cached)

    def first_token(self, now: float, *, queue_seconds: float) -> None:
        """Record the request's first token. Call it once for each request, before `tokens`."""
        m = self._metrics
        m.queue.observe(queue_seconds)
        self._ttft = now - self._began
        m.ttft.observe(self._ttft)
        self._class.ttft.observe(self._ttft)

    def tokens(self, index: int, num_tokens: int, now: float) -> None:
        """Record that output `index` of the request gained `num_tokens` tokens at the time `now`."""
        before = self._latest.get(index)
        self._latest[index] = now
        if before is None:
            self._metrics.tally.first(num_tokens)
        else:
            gap = now - before
            if gap > self._longest_gap:
                self._longest_gap = gap
            self._metrics.tally.next(num_tokens, gap, now)

    def finished(self, reason: str) -> None:
        """Count the request as finished. `reason` is "length" if any output ended by length, else "stop"."""
        if not self._ended:
            self._metrics.num_finished += 1
            self._metrics.e2e.observe(time.monotonic() - self._began)
            self._class.finished(self._ttft, self._longest_gap)
            self._end(self._metrics.finished, reason)

    def aborted(self) -> None:
        """Count the request as aborted, by its client or by a call of Abort."""
        if not self._ended:
            self._end(self._metrics.aborted)

    def failed(self, code: str) -> None:
        """Count the request as failed. `code` is the error's code in the API."""
        if not self._ended:
            if code == Overloaded.code:
                self._class.refused.inc()
            self._end(self._metrics.failed, code)

    def _end(self, counter: Counter, *labels: str) -> None:
        self._ended = True
        counter.labels(self._transport, *labels).inc()
        self._metrics.running.labels(self._transport).dec()
        self._metrics.tally.flush()


class Metrics:
    """Holds the metrics of this process, which creates one Metrics. Each scrape calls `engine` for the engine's health."""

    def __init__(self, model_name: str, engine: Callable[[], EngineHealth]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.num_finished = 0  # number of requests that this process answered in full
        self._registry = CollectorRegistry()
        self._publish: Callable[[], None] = lambda: None
        workers: Collector = self._registry
        if FOLDER_VARIABLE in os.environ:
            files = ProcessFiles(Path(os.environ[FOLDER_VARIABLE]))
            values.ValueClass = value_class(files)  # the library creates every number of a metric by this class
            workers, self._publish = AllProcesses(self._registry, files), files.publish
        self._add_requests()
        self._add_refusals()
        self._add_tokens()
        self._classes = class_metrics(self._registry, TTFT_BUCKETS, ITL_BUCKETS)
        self._exposed = CollectorRegistry(auto_describe=False)
        self._exposed.register(Exposition(workers, engine, model_name))

    def _add_requests(self) -> None:
        r = self._registry
        self.started = Counter("tidegate_requests_started", "Requests that arrived.", ["transport"], registry=r)
        self.finished = Counter("tidegate_requests_finished", "Requests answered in full.", ["transport", "reason"], registry=r)
        self.aborted = Counter("tidegate_requests_aborted", "Requests that a client left or aborted.", ["transport"], registry=r)
        self.failed = Counter(*FAILED, registry=r)
        self.running = Gauge(
            "tidegate_requests_running",
            "Requests that arrived and have not ended.",
            ["transport"],
            registry=r,
            multiprocess_mode="livesum",
        )
        self.ttft = self._histogram("tidegate_time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS)
        self.e2e = self._histogram("tidegate_request_duration_seconds", "Arrival to end, of finished requests.", E2E_BUCKETS)
        self.queue = self._histogram("tidegate_queue_seconds", "Wait in the engine's queue.", E2E_BUCKETS)

    def _add_refusals(self) -> None:
        r = self._registry
        self.refused = Counter(
            "tidegate_http_refused",
            "HTTP refused before it reached a route, by status. 503: a connection, as too many were open. Others: a malformed, "
            "oversized or too slow request.",
            ["status"],
            registry=r,
        )
        self.calls_refused = Counter(
            "tidegate_grpc_calls_refused",
            "gRPC calls refused before their message was read: too_many calls were open, or no_message came in time.",
            ["reason"],
            registry=r,
        )
        self.lines_dropped = Counter(*DROPPED, registry=r)

    def _add_tokens(self) -> None:
        r = self._registry
        self.prompt_tokens = Counter("tidegate_prompt_tokens", "Prompt tokens of requests that got a first token.", registry=r)
        self.cached_tokens = Counter("tidegate_cached_tokens", "Prompt tokens found in the prefix cache.", registry=r)
        self.output_tokens = Counter("tidegate_output_tokens", "Tokens sent to clients.", registry=r)
        self.itl = TallyHistogram(
            "tidegate_inter_token_latency_seconds", "Time between two tokens of an output.", buckets=ITL_BUCKETS, registry=r
        )
        self.tally = _TokenTally(self.output_tokens, self.itl, self._publish)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self._registry)

    def begin(self, transport: str, slo: SloName) -> RequestMeter:
        """Count a request of the class `slo` that has arrived by `transport`, which is "http" or "grpc". Returns the meter that
        measures it."""
        self.started.labels(transport).inc()
        self.running.labels(transport).inc()
        self._publish()
        return RequestMeter(self, transport, self._classes[slo], time.monotonic())

    def http_refused(self, status: int) -> None:
        """Count an HTTP request that was refused with `status` before it reached a route."""
        self.refused.labels(str(status)).inc()
        self._publish()

    def call_refused(self, reason: str) -> None:
        """Count a gRPC call that was refused before its message was read. `reason` is "too_many" or "no_message"."""
        self.calls_refused.labels(reason).inc()
        self._publish()

    def log_lines_dropped(self, number: int) -> None:
        """Count log lines that this process dropped. Any thread may call it."""
        self.lines_dropped.labels("api").inc(number)
        self._publish()

    def render(self) -> tuple[bytes, str]:
        """Return the answer to a scrape, and the answer's content type."""
        self.tally.flush()
        return generate_latest(self._exposed), CONTENT_TYPE_LATEST
