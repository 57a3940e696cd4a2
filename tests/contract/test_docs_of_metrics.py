"""Tests that the pages for operators name metrics and labels that a scrape has."""

import re
from pathlib import Path

import pytest

from engine.messages import EngineStats
from server.engines.base import EngineHealth
from server.metrics.registry import Metrics
from tests.unit.server.metrics.test_registry import samples

DOCS = Path(__file__).resolve().parents[2] / "docs"
STATS = EngineStats(limit_changes={"slow_step": 1})


def shown():
    """Return the labels of each metric of a scrape, by the metric's name. Histograms have their name without a suffix."""
    metrics = Metrics("m", lambda: EngineHealth(ready=True, stats=STATS, startup={"ready": 1.0}))
    metrics.begin("http", "standard").finished("stop")
    metrics.begin("http", "standard").aborted()
    metrics.begin("http", "standard").failed("overloaded")
    metrics.http_refused(503)
    metrics.call_refused("too_many")
    metrics.log_lines_dropped(1)
    found = {}
    for name, labels in samples(metrics):
        found.setdefault(name.removesuffix("_count"), set()).update(label for label, _ in labels)
    return found


@pytest.mark.parametrize("page", ["slo.md", "grpc.md", "architecture.md"])
def test_a_metric_that_a_page_names_is_in_a_scrape_with_these_labels(page):
    found = shown()
    named = re.findall(r"\b(tidegate_[a-z_]+)(?:\{([^}]*)\})?", (DOCS / page).read_text())
    assert named
    for name, labels in named:
        assert name in found, name
        assert {label.partition("=")[0] for label in labels.split(",") if label} <= found[name], name
