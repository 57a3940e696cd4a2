"""The answer to a scrape: the workers' metrics, the engine's, and the main ones again under the names that vLLM gives them.

The engine's numbers are those of its latest heartbeat. The vLLM view is made from the families of the same answer, so the two
names of a metric always have the same value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.messages import EngineStats
from server.engines.base import EngineHealth

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


class Exposition(Collector):
    """Collects all metric families of one scrape, each once. `workers` collects the families of the API workers."""

    def __init__(self, workers: Collector, engine: Callable[[], EngineHealth], model_name: str) -> None:
        self._workers = workers
        self._engine = engine
        self._labels = {"model_name": model_name, "engine": "0"}

    def collect(self) -> Iterable[Metric]:
        families = [*self._workers.collect(), *engine_families(self._engine())]
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
    """Return the engine's metric families. Before the first heartbeat these are only its health, restarts and start-up times."""
    families: list[Metric] = [
        GaugeMetricFamily("tidegate_engine_up", "1 if the engine is connected and healthy, else 0.", float(health.ready)),
        CounterMetricFamily("tidegate_engine_restarts", "Engine restarts since the API worker began.", float(health.restarts)),
        _startup(health),
    ]
    if health.stats is not None:
        families += [GaugeMetricFamily(name, text, float(value)) for name, text, value in _gauges(health.stats)]
        families += [CounterMetricFamily(name, text, float(value)) for name, text, value in _counters(health.stats)]
        families += _batching(health.stats)
        families += _tiers(health.stats)
    return families


# Metrics of each tier below the device: kind, name, description, and the field of TierStats.
_OF_A_TIER: tuple[tuple[type[CounterMetricFamily] | type[GaugeMetricFamily], str, str, str], ...] = (
    (GaugeMetricFamily, "tidegate_tier_blocks_used", "KV blocks in a tier below the device.", "blocks_used"),
    (GaugeMetricFamily, "tidegate_tier_blocks_limit", "Most KV blocks in a tier below the device.", "blocks_limit"),
    (CounterMetricFamily, "tidegate_tier_demoted_blocks", "KV blocks moved from the device to a tier.", "num_demoted"),
    (CounterMetricFamily, "tidegate_tier_promoted_blocks", "KV blocks moved from a tier to the device.", "num_promoted"),
    (CounterMetricFamily, "tidegate_tier_failed_moves", "Moves of KV blocks to or from a tier that failed.", "num_failed"),
    (CounterMetricFamily, "tidegate_tier_evicted_blocks", "KV blocks of a tier that made room for others.", "num_evicted"),
    (
        CounterMetricFamily,
        "tidegate_tier_dropped_blocks",
        "KV blocks of a tier that were torn, changed or foreign.",
        "num_dropped",
    ),
    (CounterMetricFamily, "tidegate_tier_unsaved_blocks", "KV blocks that a tier should have got and did not.", "num_unsaved"),
    (CounterMetricFamily, "tidegate_tier_promoted_bytes", "Bytes of KV blocks moved from a tier.", "promoted_bytes"),
    (CounterMetricFamily, "tidegate_tier_demoted_bytes", "Bytes of KV blocks moved to a tier.", "demoted_bytes"),
    (CounterMetricFamily, "tidegate_tier_promote_seconds", "Seconds in which KV blocks came from a tier.", "promote_seconds"),
    (GaugeMetricFamily, "tidegate_tier_up", "Engines whose tier works now; a disk that fails is off.", "num_on"),
)


def _gauges(stats: EngineStats) -> tuple[tuple[str, str, float], ...]:
    return (
        ("tidegate_engine_requests_running", "Outputs that own a row of the batch.", stats.running),
        ("tidegate_engine_requests_waiting", "Outputs that wait in the engine's queue.", stats.waiting),
        ("tidegate_engine_requests_loading", "Waiting outputs whose prefix is on its way from a lower tier.", stats.loading),
        (
            "tidegate_engine_gc_pause_seconds",
            "Longest pause of the engine by Python's garbage collector.",
            stats.gc_pause_seconds,
        ),
        ("tidegate_engine_batch_sequences_limit", "Most outputs that may run now.", stats.seq_limit),
        ("tidegate_engine_batch_tokens_limit", "Most tokens of a step now.", stats.token_limit),
        (
            "tidegate_engine_batch_chunk_limit",
            "Most tokens of one prompt in a step now, while other prompts want a part of the step.",
            stats.chunk_limit,
        ),
        ("tidegate_engine_work_seconds", "Predicted duration of the work that waits.", stats.work_seconds),
        (
            "tidegate_engine_predicted_ttft_over_target",
            "Time to first token predicted for a request that arrives now, over its target.",
            stats.predicted_ttft_over_target,
        ),
        (
            "tidegate_engine_predicted_itl_over_target",
            "Predicted duration of the next step, over the tightest target between tokens among the running outputs.",
            stats.predicted_itl_over_target,
        ),
        ("tidegate_kv_blocks_used", "KV-cache blocks that running requests hold.", stats.blocks_used),
        ("tidegate_kv_blocks_cached", "KV-cache blocks, held or free, whose content may be reused.", stats.blocks_cached),
        ("tidegate_kv_blocks_total", "All KV-cache blocks.", stats.blocks_total),
        ("tidegate_kv_cache_usage_ratio", "KV-cache blocks used, over all.", stats.blocks_used / max(1, stats.blocks_total)),
    )


def _counters(stats: EngineStats) -> tuple[tuple[str, str, float], ...]:
    idle = "Seconds in which the device was idle between two steps, because the CPU had not submitted the next one."
    failed = "Requests whose logits were not finite (NaN or infinity), or whose own fields excluded every token."
    compiled = "GPU kernels that the engine compiled since it started, which requests wait for once it is ready."
    return (
        ("tidegate_engine_steps", "Steps that the engine has run.", stats.step),
        ("tidegate_engine_step_seconds", "Seconds that the engine has spent in steps.", stats.step_seconds),
        ("tidegate_engine_device_seconds", "Seconds that the device has spent on steps.", stats.device_seconds),
        ("tidegate_engine_exposed_cpu_seconds", idle, stats.exposed_cpu_seconds),
        ("tidegate_engine_requests_failed", failed, stats.num_failed),
        ("tidegate_engine_log_lines_dropped", "Log lines of the engine that were dropped.", stats.log_lines_dropped),
        ("tidegate_engine_kernels_compiled", compiled, stats.kernels_compiled),
        ("tidegate_preemptions", "Preemptions: a running request gave up its KV-cache blocks.", stats.num_preemptions),
        ("tidegate_prefix_cache_queries_tokens", "Prompt tokens looked up in the prefix cache.", stats.prompt_tokens),
        ("tidegate_prefix_cache_hits_tokens", "Prompt tokens found in the prefix cache.", stats.cached_tokens),
    )


def _batching(stats: EngineStats) -> list[Metric]:
    policy = GaugeMetricFamily(
        "tidegate_engine_batching_policy", "1 for each policy that sets the limits of an engine's steps now.", labels=["policy"]
    )
    for name in stats.batching.split(","):
        policy.add_metric([name], 1.0)
    changes = CounterMetricFamily(
        "tidegate_engine_limit_changes", "Changes of the limits of a step, by reason.", labels=["reason"]
    )
    for reason, number in stats.limit_changes.items():
        changes.add_metric([reason], float(number))
    return [policy, changes]


def _tiers(stats: EngineStats) -> list[Metric]:
    """Return the hits by tier, which add up to those of the prefix cache, and the metrics of the tiers below the device."""
    hits = CounterMetricFamily(
        "tidegate_tier_hits_tokens", "Prompt tokens found in the cache, by the tier that had them.", labels=["tier"]
    )
    hits.add_metric(["gpu"], float(stats.cached_tokens - sum(tier.cached_tokens for tier in stats.tiers.values())))
    families: list[Metric] = [hits]
    for make, name, text, field in _OF_A_TIER:
        family = make(name, text, labels=["tier"])
        for tier, values in stats.tiers.items():
            family.add_metric([tier], float(getattr(values, field)))
        families.append(family)
    outages = CounterMetricFamily(
        "tidegate_tier_outages", "Times that a tier was turned off, by reason.", labels=["tier", "reason"]
    )
    for tier, values in stats.tiers.items():
        hits.add_metric([tier], float(values.cached_tokens))
        for reason, number in values.outages.items():
            outages.add_metric([tier, reason], float(number))
    decisions = CounterMetricFamily(
        "tidegate_tier_decisions",
        "Prefixes in lower tiers, by what was decided: load, part, compute, gave_up.",
        labels=["decision"],
    )
    for decision, number in stats.load_decisions.items():
        decisions.add_metric([decision], float(number))
    return [*families, outages, decisions]


def _startup(health: EngineHealth) -> Metric:
    """Return the metric of the seconds of each start-up phase. The phases' sum is the time from process start to readiness."""
    family = GaugeMetricFamily("tidegate_startup_seconds", "Seconds of each phase of the engine's start.", labels=["phase"])
    for phase, seconds in health.startup.items():
        family.add_metric([phase], seconds)
    return family
