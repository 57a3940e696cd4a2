"""Combines the statistics of several engines into those of the whole server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from engine.messages import EngineStats, TierStats

# Fields of which the server reports the largest value among its engines. The other numbers are added up.
_LARGEST = frozenset({"gc_pause_seconds", "chunk_limit", "predicted_ttft_over_target", "predicted_itl_over_target"})


def combined(stats: Sequence[EngineStats]) -> EngineStats | None:
    """Return the statistics of all engines together. Returns None if there are no statistics.

    `batching` lists the policies in force in alphabetical order, each once, separated by commas.
    """
    if len(stats) < 2:
        return stats[0] if stats else None
    fields: dict[str, Any] = {
        name: _combine(name, [getattr(each, name) for each in stats]) for name in EngineStats.__struct_fields__
    }
    return EngineStats(**fields)


def _combine(name: str, values: list[Any]) -> Any:
    if name == "batching":
        return ",".join(sorted(set(values)))
    if name in ("limit_changes", "load_decisions", "outages"):
        return dict(sum(map(Counter, values), Counter()))
    if name == "tiers":
        names = sorted({tier for each in values for tier in each})
        return {tier: _added([each[tier] for each in values if tier in each]) for tier in names}
    return max(values) if name in _LARGEST else sum(values)


def _added(stats: Sequence[TierStats]) -> TierStats:
    return TierStats(**{name: _combine(name, [getattr(each, name) for each in stats]) for name in TierStats.__struct_fields__})
