"""Draws single plots into axes: latency and load over time, limits over time, goodput over load, users against the GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, SymmetricalLogLocator
from numpy.typing import NDArray

from loadtest.figures import Figures
from loadtest.measure import Measurement
from loadtest.options import Slo
from loadtest.scrape import LIMITS, STATE

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#1f6fb4", "#e07b00", "#2a8c4a", "#c23b3b", "#777777"
_COLOURS = (_BLUE, _ORANGE, _GREEN, _RED, "#7a52a8", "#8a6d3b")
_MOST_WINDOWS = 60  # of a plot over time


def latency_over_time(axes: Axes, measurement: Measurement, name: str, title: str) -> None:
    """Draw each request's latency at its due time, and P50 and P99 of short windows."""
    axes.set_title(title)
    axes.set(xlabel="seconds", ylabel="ms")
    ok = [r for r in measurement.records if r.outcome == "ok" and not r.slow]
    if not ok:
        _empty(axes, "no request was answered")
        return
    at = np.array([record.at for record in ok])
    values = np.array([getattr(record, name) for record in ok]) * 1e3
    # A request of one event has no gap: it is drawn at the axis, since a logarithmic scale has no 0.
    floor = max(0.1, float(values[values > 0].min(initial=1e9)) if (values > 0).any() else 0.1)
    axes.scatter(at, np.maximum(values, floor), s=9, color=_BLUE, alpha=0.4, linewidths=0, label="a request")
    edges = _edges(measurement, at)
    for p, colour in ((50, _GREEN), (99, _RED)):
        middles, found = _by_window(edges, at, values, p)
        axes.plot(middles, np.maximum(found, floor), color=colour, linewidth=1.6, marker=".", markersize=3, label=f"P{p}")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter("{x:g}")
    _steps(axes, measurement)
    axes.legend(loc="upper left", ncols=3, markerscale=2)
    axes.margins(y=0.25)


def load_over_time(axes: Axes, measurement: Measurement) -> None:
    """Draw output tokens per second, and on a second axis the requests under way."""
    axes.set_title("output tokens/s, and requests under way")
    axes.set(xlabel="seconds", ylabel="output tokens/s")
    records = measurement.records
    sent = np.array([r.sent for r in records])
    times = np.concatenate([np.empty(0), *(r.times + r.sent for r in records)])
    if not len(times):
        _empty(axes, "no token arrived")
        return
    weights = np.concatenate([r.weights for r in records])
    edges = _edges(measurement, np.concatenate([sent, times]))
    tokens, _ = np.histogram(times, bins=edges, weights=weights)
    (line,) = axes.plot(
        (edges[1:] + edges[:-1]) / 2, tokens / np.diff(edges), color=_BLUE, linewidth=1.6, label="output tokens/s"
    )
    axes.set_ylim(0, max(1.0, float((tokens / np.diff(edges)).max()) * 1.25))
    ends = np.sort(sent + np.array([r.e2e for r in records]))
    at = np.linspace(edges[0], edges[-1], 400)
    under_way = np.searchsorted(np.sort(sent), at, side="right") - np.searchsorted(ends, at, side="right")
    second = axes.twinx()
    second.grid(visible=False)
    second.set_ylabel("requests under way")
    (other,) = second.plot(at, under_way, color=_ORANGE, linewidth=1.2, label="requests under way (right)")
    second.set_ylim(bottom=0, top=max(1.0, under_way.max() * 1.3))
    _steps(axes, measurement)
    axes.legend(handles=[line, other], loc="upper left", ncols=2)


def limits_over_time(axes: Axes, measurement: Measurement) -> None:
    """Draw the limits of the server's steps, and the requests that run and wait, as the server's metrics had them."""
    axes.set_title("limits of the server's steps, and its requests")
    axes.set_xlabel("seconds")
    if measurement.scrape_failures is None:
        _empty(axes, "the server's metrics were not read")
        return
    drawn = 0
    for label, colour in zip((*LIMITS, *STATE), _COLOURS, strict=False):
        points = [(sample.at, sample.values[label]) for sample in measurement.samples if label in sample.values]
        if points:
            style = "-" if label in LIMITS else ":"
            axes.step(*zip(*points, strict=True), where="post", color=colour, linestyle=style, linewidth=1.6, label=label)
            drawn += 1
    if not drawn:
        _empty(axes, "the server's metrics had none of the series")
        return
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=(1, 2, 5)))
    axes.margins(y=0.35)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g}")
    if not any(label in sample.values for sample in measurement.samples for label in LIMITS):
        axes.text(0.98, 0.04, "the server has no series of limits", transform=axes.transAxes, ha="right", color=_GREY)
    axes.legend(loc="upper left", ncols=3)


def goodput_over_load(axes: Axes, found: Sequence[Figures], slos: Sequence[Slo]) -> None:
    """Draw good requests per second over requests per second, with the line on which every request is good."""
    axes.set_title("goodput over load")
    axes.set(xlabel="requests/s sent", ylabel="good requests/s")
    sent = np.array([f.sent / f.seconds for f in found])
    top = max(float(sent.max(initial=0.0)), 0.01) * 1.08
    axes.plot([0, top], [0, top], color=_GREY, linestyle="--", linewidth=1, label="all good")
    order = np.argsort(sent, kind="stable")
    for slo, colour, marker in zip(slos, _COLOURS * (1 + len(slos) // len(_COLOURS)), "osD^vP" * len(slos), strict=False):
        values = np.array([f.goodput[slo.text] for f in found])
        axes.plot(sent[order], values[order], color=colour, marker=marker, markersize=5, linewidth=1.2, label=slo.text)
    axes.set(xlim=(0, top), ylim=(0, top * 1.02))
    axes.legend(loc="upper left")


def user_against_gpu(axes: Axes, found: Sequence[Figures], gpus: int) -> None:
    """Draw what one user gets against what the hardware gives, for each load."""
    axes.set_title("tokens/s of a user against tokens/s of a GPU")
    axes.set(xlabel="output tokens/s of a GPU", ylabel="tokens/s of a user (median)")
    points = [(f.out_tok_s / gpus, f.user_tok_s, f.name) for f in found if f.user_tok_s is not None]
    if not points:
        _empty(axes, "no request had two tokens")
        return
    axes.plot(
        [x for x, _, _ in points], [y for _, y, _ in points], color=_BLUE, marker="o", markersize=5, linewidth=0.8, alpha=0.8
    )
    named: set[str] = set()
    for x, y, name in points:
        if name not in named:  # a rate that comes again on the way back is drawn, and named once
            offset = (5, 6) if len(named) % 2 == 0 else (5, -13)
            axes.annotate(name.removeprefix("open "), (x, y), textcoords="offset points", xytext=offset, fontsize=8)
        named.add(name)
    axes.set_xlim(0, max(x for x, _, _ in points) * 1.15)
    axes.set_ylim(0, max(y for _, y, _ in points) * 1.25)


def _edges(measurement: Measurement, at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the edges of the windows of a plot: of one second or more, from the warm-up to the last of `at`."""
    start, end = -measurement.load.warm_up, max(float(at.max()), measurement.load.measured_seconds)
    width = max(1, math.ceil((end - start) / _MOST_WINDOWS))
    num = math.floor((end - start) / width) + 2  # the last edge is above `end`
    return np.linspace(start, start + width * (num - 1), num)


def _by_window(
    edges: NDArray[np.float64], at: NDArray[np.float64], values: NDArray[np.float64], p: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the middles of the windows, and the percentile `p` of the values in each; NaN where there is none."""
    which = np.clip(np.digitize(at, edges) - 1, 0, len(edges) - 2)
    found = np.full(len(edges) - 1, np.nan)
    for i in np.unique(which):
        found[i] = np.percentile(values[which == i], p, method="inverted_cdf")
    return (edges[1:] + edges[:-1]) / 2, found


def _steps(axes: Axes, measurement: Measurement) -> None:
    """Mark the warm-up, the steps of the rate, and the end of the window."""
    load, at = measurement.load, 0.0
    if load.warm_up:
        axes.axvspan(-load.warm_up, 0, color=_GREY, alpha=0.12, linewidth=0)
    for step in load.steps if len(load.steps) > 1 else ():
        axes.axvline(at, color=_GREY, linewidth=0.6, alpha=0.6)
        text = f"{step.rate:g}" if step.rate == step.end_rate else f"{step.rate:g}-{step.end_rate:g}"
        axes.text(at, 0.005, text, transform=axes.get_xaxis_transform(), fontsize=7, color=_GREY, va="bottom")
        at += step.seconds
    axes.axvline(load.measured_seconds, color=_GREY, linewidth=0.8, linestyle="--")


def _empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=_GREY)
