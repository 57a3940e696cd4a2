"""Draws the page of plots of a run: a PNG file, or an HTML file that needs nothing else and also has the figures as a table."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loadtest import plots
from loadtest.figures import Figures, windows
from loadtest.line import About, command, workload
from loadtest.measure import Measurement
from loadtest.options import Slo
from server.bench import lines

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em; color: #222 }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 13px }
td, th { padding: 3px 9px; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
code { background: #f3f3f3; padding: 1px 4px; overflow-wrap: anywhere }
h2 { margin-top: 1.6em }
"""


def write_page(measurements: Sequence[Measurement], slos: Sequence[Slo], about: About, path: Path) -> None:
    """Write the page of all measurements of a run to `path`."""
    if path.suffix == ".png":
        path.write_bytes(_png(_figure(measurements, slos, about)))
        return
    path.write_text(_html(measurements, slos, about), encoding="utf-8")


def _figure(measurements: Sequence[Measurement], slos: Sequence[Slo], about: About) -> Figure:
    """Return one figure: what the loads have in common above, and the course of each load below."""
    with mpl.rc_context(plots.STYLE):
        rows = 1 + 2 * len(measurements)
        figure = Figure(figsize=(13, 3.9 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, 2, squeeze=False)
        found = [figures for measurement in measurements for figures in windows(measurement, slos)]
        plots.goodput_over_load(axes[0][0], found, slos)
        plots.user_against_gpu(axes[0][1], found, about.gpus)
        for i, measurement in enumerate(measurements):
            upper, lower = axes[1 + 2 * i], axes[2 + 2 * i]
            name = workload(measurement, about)
            plots.latency_over_time(upper[0], measurement, "ttft", f"TTFT: {name}")
            plots.latency_over_time(upper[1], measurement, "longest_gap", f"longest gap of a request: {name}")
            plots.load_over_time(lower[0], measurement)
            plots.limits_over_time(lower[1], measurement)
        return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _html(measurements: Sequence[Measurement], slos: Sequence[Slo], about: About) -> str:
    target = measurements[0].target
    image = base64.b64encode(_png(_figure(measurements, slos, about))).decode()
    title = f"Load test of {target.model}"
    facts = [about.engine or "", about.device or "", about.precision or "", lines.today(), f"load test at {lines.commit()}"]
    tables = "".join(_table(measurement, slos, about) for measurement in measurements)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
        f"</head><body><h1>{html.escape(title)}</h1><p>{html.escape(', '.join(filter(None, facts)))}</p>"
        f"<p><code>{html.escape(command())}</code></p>{tables}<h2>Plots</h2>"
        f'<img alt="plots of the run" src="data:image/png;base64,{image}"></body></html>\n'
    )


def _table(measurement: Measurement, slos: Sequence[Slo], about: About) -> str:
    heads = ["load", "sent", "ok", "refused", "failed", "cancelled", "out tok/s", "tok/s a user"]
    heads += ["TTFT P50", "TTFT P99", "ITL P99", "longest gap P99", "E2E P99", *(f"good/s {slo.text}" for slo in slos)]
    rows = [_row(figures, slos) for figures in windows(measurement, slos)]
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    cut = " (interrupted)" if measurement.interrupted else ""
    return (
        f"<h2>{html.escape(workload(measurement, about) + cut)}</h2><table><tr>{head}</tr>{body}</table><p>Latencies in ms.</p>"
    )


def _row(f: Figures, slos: Sequence[Slo]) -> list[str]:
    counts = [str(n) for n in (f.sent, f.ok, f.refused, f.failed + f.unfinished, f.cancelled)]
    speeds = [f"{f.out_tok_s:.0f}", "-" if f.user_tok_s is None else f"{f.user_tok_s:.1f}"]
    pairs = ((f.ttft_ms, "p50"), (f.ttft_ms, "p99"), (f.itl_ms, "p99"), (f.gap_ms, "p99"), (f.e2e_ms, "p99"))
    times = ["-" if found is None else f"{found[p]:.1f}" for found, p in pairs]
    return [f.name, *counts, *speeds, *times, *(f"{f.goodput[slo.text]:.2f}" for slo in slos)]
