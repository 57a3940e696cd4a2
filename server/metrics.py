"""Prometheus metrics: `tidegate_*` in seconds, tokens and blocks, and the main ones again under the names that vLLM gives them.

Alone, a process answers for itself. With PROMETHEUS_MULTIPROC_DIR set before this is imported, each API worker writes its numbers
to files there, and whichever worker is scraped answers for all.

What the engine counts is read from its latest heartbeat when a scrape comes. The vLLM view is made then, too, from the families
about to be sent: the two cannot disagree. At every moment, started = finished + aborted + failed + running.
"""

from __future__ import annotations

import json
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from server.engines.base import EngineHealth

# vLLM's, so that dashboards made for one can read the other.
_SECONDS = (0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_SHORT_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5)
_LONG_SECONDS = (20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
TTFT_BUCKETS = (*_SHORT_SECONDS, *_SECONDS, 160.0, 640.0, 2560.0)
ITL_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, *_SECONDS)
E2E_BUCKETS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, *_LONG_SECONDS)

_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
_FAILED = ("tidegate_requests_failed", "Requests that ended in an error.")
FLUSH_SECONDS = 0.5  # token counts reach the registry this late at most, while tokens come
_VLLM_NAMES = {
    "tidegate_engine_requests_running": "vllm:num_requests_running",
    "tidegate_engine_requests_waiting": "vllm:num_requests_waiting",
    "tidegate_kv_cache_usage_ratio": "vllm:kv_cache_usage_perc",
    "tidegate_prefix_cache_queries_tokens": "vllm:prefix_cache_queries",
    "tidegate_prefix_cache_hits_tokens": "vllm:prefix_cache_hits",
    "tidegate_preemptions": "vllm:num_preemptions",
    "tidegate_prompt_tokens": "vllm:prompt_tokens",
    "tidegate_output_tokens": "vllm:generation_tokens",
    "tidegate_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "tidegate_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "tidegate_request_duration_seconds": "vllm:e2e_request_latency_seconds",
    "tidegate_queue_seconds": "vllm:request_queue_time_seconds",
    "tidegate_requests_finished": "vllm:request_success",
}
_VLLM_LABELS = {"reason": "finished_reason"}


class TallyHistogram(Histogram):
    """A histogram that takes many observations at once, counted by bucket beforehand."""

    def add(self, counts: list[int], total: float) -> None:
        """`counts[i]` observations fell into bucket i (the last one is +Inf); their sum is `total`."""
        self._sum.inc(total)
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)


class _TokenTally:
    """Counts of the tokens since the last flush: in plain numbers, because it is touched for every token."""

    __slots__ = ("_flush_at", "_itl", "_itl_counts", "_itl_total", "_num_tokens", "_tokens")

    def __init__(self, tokens: Counter, itl: TallyHistogram) -> None:
        self._tokens = tokens
        self._itl = itl
        self._flush_at = 0.0
        self._num_tokens = 0
        self._itl_total = 0.0
        self._itl_counts = [0] * (len(ITL_BUCKETS) + 1)

    def first(self, num_tokens: int) -> None:
        self._num_tokens += num_tokens

    def next(self, num_tokens: int, seconds: float, now: float) -> None:
        """Tokens that came together, `seconds` after the ones before: each of them counts as an equal share of the wait."""
        self._num_tokens += num_tokens
        self._itl_total += seconds
        self._itl_counts[bisect_left(ITL_BUCKETS, seconds / num_tokens)] += num_tokens
        if now > self._flush_at:
            self._flush_at = now + FLUSH_SECONDS
            self.flush()

    def flush(self) -> None:
        if self._num_tokens:
            self._tokens.inc(self._num_tokens)
            self._num_tokens = 0
        if any(self._itl_counts):
            self._itl.add(self._itl_counts, self._itl_total)
            self._itl_counts = [0] * (len(ITL_BUCKETS) + 1)
            self._itl_total = 0.0


class RequestMeter:
    """One request, from `Metrics.begin` to one of `finished`, `aborted` and `failed`; the first of them counts.

    A request of n outputs is one request. Its inter-token latencies are taken output by output.
    """

    __slots__ = ("_began", "_ended", "_latest", "_metrics", "_transport")

    def __init__(self, metrics: Metrics, transport: str, now: float) -> None:
        self._metrics = metrics
        self._transport = transport
        self._began = now
        self._ended = False
        self._latest: dict[int, float] = {}  # output index to the time of its latest tokens

    def first_token(self, now: float, *, prompt_tokens: int, cached_tokens: int, queue_seconds: float) -> None:
        """Once a request, before `tokens`."""
        m = self._metrics
        m.prompt_tokens.inc(prompt_tokens)
        m.cached_tokens.inc(cached_tokens)
        m.queue.observe(queue_seconds)
        m.ttft.observe(now - self._began)

    def tokens(self, index: int, num_tokens: int, now: float) -> None:
        """Output `index` gained tokens."""
        before = self._latest.get(index)
        self._latest[index] = now
        if before is None:
            self._metrics.tally.first(num_tokens)
        else:
            self._metrics.tally.next(num_tokens, now - before, now)

    def finished(self, reason: str) -> None:
        if not self._ended:
            self._metrics.num_finished += 1
            self._metrics.e2e.observe(time.monotonic() - self._began)
            self._end(self._metrics.finished, reason)

    def aborted(self) -> None:
        if not self._ended:
            self._end(self._metrics.aborted)

    def failed(self, code: str) -> None:
        if not self._ended:
            self._end(self._metrics.failed, code)

    def _end(self, counter: Counter, *labels: str) -> None:
        self._ended = True
        self._metrics.tally.flush()
        counter.labels(self._transport, *labels).inc()
        self._metrics.running.labels(self._transport).dec()


class Metrics:
    """One a process. `engine` gives the engine's health, and is asked at each scrape.

    `reason` of a finished request is "length" where any of its outputs ended so, else "stop"; `code` of a failed one is its
    error's.
    """

    def __init__(self, model_name: str, engine: Callable[[], EngineHealth]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.num_finished = 0  # requests that this process answered to the end
        r = self._registry = CollectorRegistry()
        self.started = Counter("tidegate_requests_started", "Requests that arrived.", ["transport"], registry=r)
        self.finished = Counter(
            "tidegate_requests_finished", "Requests answered to the end.", ["transport", "reason"], registry=r
        )
        self.aborted = Counter("tidegate_requests_aborted", "Requests left or aborted.", ["transport"], registry=r)
        self.failed = Counter(*_FAILED, ["transport", "code"], registry=r)
        self.running = Gauge(
            "tidegate_requests_running",
            "Requests that arrived and have not ended.",
            ["transport"],
            registry=r,
            multiprocess_mode="livesum",
        )
        self.unreadable = Counter(
            "tidegate_http_unreadable", "Malformed, oversized or too slow HTTP, by the status it got.", ["status"], registry=r
        )
        self.prompt_tokens = Counter("tidegate_prompt_tokens", "Prompt tokens of requests that got a first token.", registry=r)
        self.cached_tokens = Counter("tidegate_cached_tokens", "Of these, found in the prefix cache.", registry=r)
        self.output_tokens = Counter("tidegate_output_tokens", "Tokens sent to clients.", registry=r)
        self.ttft = self._histogram("tidegate_time_to_first_token_seconds", "From arrival to the first token.", TTFT_BUCKETS)
        self.itl = TallyHistogram(
            "tidegate_inter_token_latency_seconds", "Between the tokens of an output.", buckets=ITL_BUCKETS, registry=r
        )
        self.e2e = self._histogram("tidegate_request_duration_seconds", "From arrival to the end, if finished.", E2E_BUCKETS)
        self.queue = self._histogram("tidegate_queue_seconds", "In the engine's queue.", E2E_BUCKETS)
        self.tally = _TokenTally(self.output_tokens, self.itl)
        own: Collector = r
        if _DIRECTORY in os.environ:
            own = MultiProcessCollector(CollectorRegistry())  # type: ignore[no-untyped-call]
        self._exposed = CollectorRegistry(auto_describe=False)
        self._exposed.register(_Exposed(own, engine, model_name))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self._registry)

    def begin(self, transport: str) -> RequestMeter:
        """A request has arrived by "http" or "grpc"."""
        self.started.labels(transport).inc()
        self.running.labels(transport).inc()
        return RequestMeter(self, transport, time.monotonic())

    def unreadable_http(self, status: int) -> None:
        """A client's bytes were refused before they made a request; only this tells of it, and no line in the log."""
        self.unreadable.labels(str(status)).inc()

    def render(self) -> tuple[bytes, str]:
        """The answer to a scrape, and its content type."""
        self.tally.flush()
        return generate_latest(self._exposed), CONTENT_TYPE_LATEST


class _Exposed(Collector):
    """What a scrape gets: this process's (or all workers') families, the engine's, and vLLM's names for some of both."""

    def __init__(self, own: Collector, engine: Callable[[], EngineHealth], model_name: str) -> None:
        self._own = own
        self._engine = engine
        self._labels = {"model_name": model_name, "engine": "0"}

    def collect(self) -> Iterable[Metric]:
        families = [*self._own.collect(), *engine_families(self._engine())]
        yield from families
        for family in families:
            if family.name in _VLLM_NAMES:
                yield self._renamed(family, _VLLM_NAMES[family.name])

    def _renamed(self, family: Metric, name: str) -> Metric:
        renamed = Metric(name, family.documentation, family.type)
        for sample in family.samples:
            labels = {_VLLM_LABELS.get(key, key): value for key, value in sample.labels.items()}
            renamed.add_sample(name + sample.name.removeprefix(family.name), {**self._labels, **labels}, sample.value)
        return renamed


def engine_families(health: EngineHealth) -> list[Metric]:
    """The engine as its latest heartbeat told of it; without one, only whether it is up."""
    families: list[Metric] = [
        GaugeMetricFamily("tidegate_engine_up", "Whether the engine is reached and turning.", float(health.ready)),
        CounterMetricFamily("tidegate_engine_restarts", "Engines seen, less one.", float(health.restarts)),
        _startup(health),
    ]
    stats = health.stats
    if stats is None:
        return families
    gauges = (
        ("tidegate_engine_requests_running", "Outputs that own a batch row.", stats.running),
        ("tidegate_engine_requests_waiting", "Outputs in the engine's queue.", stats.waiting),
        ("tidegate_engine_gc_pause_seconds", "Longest pause by Python's garbage collector.", stats.gc_pause_seconds),
        ("tidegate_kv_blocks_used", "Cache blocks that requests hold.", stats.blocks_used),
        ("tidegate_kv_blocks_cached", "Cache blocks kept for later requests, free otherwise.", stats.blocks_cached),
        ("tidegate_kv_blocks_total", "Cache blocks there are.", stats.blocks_total),
        ("tidegate_kv_cache_usage_ratio", "Used of total.", stats.blocks_used / max(1, stats.blocks_total)),
    )
    counters = (
        ("tidegate_engine_steps", "Steps run.", stats.step),
        ("tidegate_engine_step_seconds", "In steps.", stats.step_seconds),
        ("tidegate_engine_exposed_cpu_seconds", "Of these, while the device had nothing to do.", stats.exposed_cpu_seconds),
        (
            "tidegate_engine_requests_failed",
            "Requests ended because their logits were not finite (NaN or infinity).",
            stats.num_failed,
        ),
        ("tidegate_preemptions", "Requests that had to give up their blocks.", stats.num_preemptions),
        ("tidegate_prefix_cache_queries_tokens", "Prompt tokens looked up.", stats.prompt_tokens),
        ("tidegate_prefix_cache_hits_tokens", "Of these, found.", stats.cached_tokens),
    )
    families += [GaugeMetricFamily(name, text, float(value)) for name, text, value in gauges]
    families += [CounterMetricFamily(name, text, float(value)) for name, text, value in counters]
    return families


def _startup(health: EngineHealth) -> Metric:
    """Phases follow one another: they sum to the time from the process's start until a request could come."""
    family = GaugeMetricFamily("tidegate_startup_seconds", "Of the engine's start, by phase.", labels=["phase"])
    for phase, seconds in health.startup.items():
        family.add_metric([phase], seconds)
    return family


def worker_died(pid: int) -> None:
    """For the supervisor, once a worker of a multiprocess run is gone: what it had running has failed."""
    folder = Path(os.environ[_DIRECTORY])
    lost = _running_of(folder / f"gauge_livesum_{pid}.db")
    mark_process_dead(pid)  # type: ignore[no-untyped-call]
    if not lost:
        return
    counters: Any = MmapedDict(str(folder / f"counter_{pid}.db"))  # type: ignore[no-untyped-call]
    name, text = _FAILED
    for transport, count in lost.items():
        key = mmap_key(name, f"{name}_total", ["transport", "code"], [transport, "worker_died"], text)
        value, _ = counters.read_value(key)
        counters.write_value(key, value + count, 0.0)
    counters.close()


def _running_of(file: Path) -> dict[str, float]:
    """Requests by transport that a worker's file says are running."""
    if not file.is_file():
        return {}
    lost = {}
    for key, value, *_ in MmapedDict.read_all_values_from_file(str(file)):  # type: ignore[no-untyped-call]
        metric, _, labels, _ = json.loads(key)
        if metric == "tidegate_requests_running" and value > 0:
            lost[labels["transport"]] = value
    return lost
