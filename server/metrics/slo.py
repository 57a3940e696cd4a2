"""Metrics by SLO class: how many requests kept what their class promises, the times to their first tokens, their longest gaps.

Of every class at every moment, and of all classes together: requests finished = good + late.
"""

from __future__ import annotations

from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram

from engine.slo import SLO_CLASSES, SloClass

_LABELS = ["slo_class"]


class ClassMetrics(NamedTuple):
    """The metrics of one SLO class."""

    slo: SloClass
    good: Counter
    late: Counter
    ttft: Histogram
    longest_gap: Histogram
    refused: Counter

    def finished(self, ttft: float, longest_gap: float) -> None:
        """Count a request that was answered in full. It is good if both durations are within the class's targets."""
        slo = self.slo
        is_good = (slo.ttft is None or ttft <= slo.ttft) and (slo.itl is None or longest_gap <= slo.itl)
        (self.good if is_good else self.late).inc()
        self.longest_gap.observe(longest_gap)


def class_metrics(
    registry: CollectorRegistry, ttft_buckets: tuple[float, ...], gap_buckets: tuple[float, ...]
) -> dict[str, ClassMetrics]:
    """Create the metrics of all classes in `registry`. Returns those of each class by its name. All begin at 0."""
    targets = "the first token and the longest wait between two tokens"
    good = Counter(
        "tidegate_requests_good", f"Finished requests of which {targets} kept the class's targets.", _LABELS, registry=registry
    )
    late = Counter(
        "tidegate_requests_late", f"Finished requests of which {targets} did not both keep them.", _LABELS, registry=registry
    )
    ttft = Histogram(
        "tidegate_slo_time_to_first_token_seconds",
        "Arrival to first token.",
        _LABELS,
        buckets=ttft_buckets,
        registry=registry,
    )
    gap = Histogram(
        "tidegate_slo_longest_gap_seconds",
        "Longest wait between two tokens of an output, of finished requests.",
        _LABELS,
        buckets=gap_buckets,
        registry=registry,
    )
    refused = Counter(
        "tidegate_requests_refused",
        "Requests refused because too much waits, or because they could not be served in time.",
        _LABELS,
        registry=registry,
    )
    return {
        name: ClassMetrics(slo, good.labels(name), late.labels(name), ttft.labels(name), gap.labels(name), refused.labels(name))
        for name, slo in SLO_CLASSES.items()
    }
