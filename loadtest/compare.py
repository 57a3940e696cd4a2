"""Measures two endpoints in turns, A B A B ..., and compares their figures round by round.

A machine is faster at one time than at another. Two measurements of one round are neighbours in time and have the same load, so
their ratio is less disturbed than the figures themselves. The spread over the rounds says how far to trust it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from loadtest.figures import Figures, whole
from loadtest.line import About, client_of, command, workload, write_line
from loadtest.measure import Measurement, measure
from loadtest.options import Slo
from loadtest.probe import probe
from loadtest.progress import Progress
from loadtest.run import Output, metrics_url, write_raw
from loadtest.spec import Load, LoadError, Target
from loadtest.table import remarks
from server.bench import lines

_LATENCIES = ("ttft_ms", "itl_ms", "tpot_ms", "gap_ms", "e2e_ms")
_SPEEDS = ("out_tok_s", "total_tok_s", "user_tok_s")


class Ratio(msgspec.Struct, frozen=True):
    """A figure of B over the same figure of A: median, least and greatest over the rounds."""

    a: float  # median over the rounds
    b: float
    ratio: float
    least: float
    greatest: float


def compare_targets(
    load: Load,
    targets: tuple[Target, Target],
    slos: Sequence[Slo],
    about: About,
    output: Output,
    *,
    rounds: int,
    procs: int,
    console: Console,
) -> list[tuple[Measurement, Measurement]]:
    """Measure both targets `rounds` times. Returns the whole rounds; Ctrl-C ends the comparison after them. Raises LoadError."""
    output.check()
    if output.page is not None:
        raise LoadError("compare draws no page: use --page with run")
    probed = with_one_vocabulary([probe(target, load) for target in targets])
    done: list[tuple[Measurement, Measurement]] = []
    for number in range(rounds):
        pair = []
        for name, target in zip("AB", probed, strict=True):
            fresh = msgspec.structs.replace(load, number=number)  # prompts of its own, the same for A and B
            with Progress(console, f"round {number + 1} of {rounds}, {name}") as progress:
                pair.append(measure(fresh, target, procs=procs, metrics=metrics_url(target, None), watch=progress))
            write_raw(pair[-1], output.raw)
            _tell(pair[-1], name, slos, console)
            if pair[-1].interrupted or pair[-1].problem:
                _report(done, slos, about, output, console)
                return done
        done.append((pair[0], pair[1]))
    _report(done, slos, about, output, console)
    return done


def with_one_vocabulary(targets: Sequence[Target]) -> list[Target]:
    """Return the targets with the smallest of their vocabularies, so that both get the same prompts."""
    vocab = min(target.vocab for target in targets)
    return [msgspec.structs.replace(target, vocab=vocab) for target in targets]


def ratios(pairs: Sequence[tuple[Figures, Figures]]) -> dict[str, Ratio]:
    """Return the ratios by figure. A figure that is missing or 0 on either side in some round is left out."""
    flat = [(_flat(a), _flat(b)) for a, b in pairs]
    found = {}
    for key in flat[0][0] if flat else ():
        both = [(a.get(key), b.get(key)) for a, b in flat]
        values = [(a, b) for a, b in both if a and b]
        if len(values) == len(flat):
            each = [b / a for a, b in values]
            a, b = (statistics.median(side) for side in zip(*values, strict=True))
            found[key] = Ratio(*(round(v, 4) for v in (a, b, statistics.median(each), min(each), max(each))))
    return found


def _flat(figures: Figures) -> dict[str, float | None]:
    found: dict[str, float | None] = {name: getattr(figures, name) for name in _SPEEDS}
    for name in _LATENCIES:
        found |= {f"{name} {p}": value for p, value in (getattr(figures, name) or {}).items()}
    return found | {f"goodput {slo}": value for slo, value in figures.goodput.items()} | {"ok": float(figures.ok)}


def _tell(measurement: Measurement, name: str, slos: Sequence[Slo], console: Console) -> None:
    """Print what went wrong in one measurement, and how the load test itself fared."""
    for line in remarks(measurement, [whole(measurement, slos)]):
        console.print(f"{name}: {line}", highlight=False)


def _report(
    done: Sequence[tuple[Measurement, Measurement]], slos: Sequence[Slo], about: About, output: Output, console: Console
) -> None:
    """Print the table, and write the line of the comparison."""
    if not done:
        return
    pairs = [(whole(a, slos), whole(b, slos)) for a, b in done]
    found = ratios(pairs)
    table = Table(box=None, pad_edge=False, header_style="bold", title=f"B over A, {len(done)} rounds", title_justify="left")
    for head in ("figure", "A", "B", "B/A", "least", "greatest"):
        table.add_column(head, justify="left" if head == "figure" else "right")
    for key, r in found.items():
        table.add_row(key, f"{r.a:.4g}", f"{r.b:.4g}", f"{r.ratio:.3f}", f"{r.least:.3f}", f"{r.greatest:.3f}")
    console.print(table)
    write_line(_line(done, pairs, found, about), output.record)


def _line(
    done: Sequence[tuple[Measurement, Measurement]],
    pairs: Sequence[tuple[Figures, Figures]],
    found: dict[str, Ratio],
    about: About,
) -> dict[str, Any]:
    first = done[0]
    sides = {name: (m.target.url, m.target.model, m.target.route) for name, m in zip("ab", first, strict=True)}
    return {
        "date": lines.today(),
        "commit": lines.commit(),
        "device": about.device,
        "engine": about.engine,
        "model": first[1].target.model,
        "precision": about.precision,
        "workload": f"compare: {workload(first[0], about)}",
        "seconds": pairs[0][0].seconds,
        **({"tag": about.tag} if about.tag else {}),
        "rounds": len(done),
        **{name: {"url": url, "model": model, "route": route} for name, (url, model, route) in sides.items()},
        "requests": {name: _counts([pair[i] for pair in pairs]) for i, name in enumerate("ab")},
        "ratios": msgspec.to_builtins(found),
        "client": [[client_of(m) for m in pair] for pair in done],
        "seed": first[0].load.seed,
        "command": command(),
    }


def _counts(figures: Sequence[Figures]) -> dict[str, int]:
    return {name: sum(getattr(f, name) for f in figures) for name in ("sent", "ok", "refused", "failed", "cancelled")}
