"""Implements `tidegate bench plan`: how many replicas keep a load within its targets, found by simulation.

For each cost file, the highest rate is searched that one replica keeps: first by doubling or halving, then by bisection. All
rates have the same requests, closer together or further apart, so that a higher rate is hardly better by chance. Requests of the
first WARM_UP seconds are not judged, since the replica is emptier then than later. Those of a trace are judged all.

A load balancer is assumed that spreads arrivals evenly, so that each of N replicas gets such arrivals of 1/N of the rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from engine.config import BatchingPolicy
from engine.errors import ConfigError
from engine.request import FinishReason
from engine.scheduler.cost_file import CostKey, load_costs
from engine.slo import INTERACTIVE, STANDARD, SloClass
from server.bench import lines
from server.bench.lines import PlanLine, PlannedCard, PlannedRate
from server.bench.loads import Arrival, Client, LoadShape, bursts, poisson, read_trace, shape_of
from server.bench.outcomes import Target, outcome, percentile
from server.bench.simulate import Machine, simulate

SHARE = 0.99
SECONDS = 60.0
WARM_UP = 20.0
FEWEST_REQUESTS = 200  # a lower rate is simulated for longer
FIRST_RATE, LOWEST_RATE, HIGHEST_RATE = 8.0, 1 / 64, 4096.0
PRECISION = 1.03  # ratio of a rate that fails to the rate that is reported
ALONE = 300  # requests with which it is tried whether an idle replica keeps the targets
_ROW = "{:>10} {:>8} {:>10} {:>12} {:>12} {:>10} {:>8}"
_HEAD = _ROW.format("requests/s", "good", "goodput/s", "TTFT P99 ms", "gap P99 ms", "refused", "device")


class Load(NamedTuple):
    """Arrivals of one rate. Those before `judged_from` are not judged, and the others take `seconds`."""

    arrivals: list[Arrival]
    judged_from: float
    seconds: float


class Wanted(NamedTuple):
    """The load, and what share of its requests must be good."""

    shape: LoadShape
    target: Target
    share: float = SHARE
    prefix: int = 0
    cv: float = 1.0
    seconds: float = SECONDS
    trace: Sequence[Arrival] = ()  # replaces the shape, if it is not empty

    @property
    def slo(self) -> SloClass:
        """The class with the longest time between tokens that keeps the target, or else the strictest."""
        return STANDARD if STANDARD.itl is not None and STANDARD.itl <= self.target.gap else INTERACTIVE

    @property
    def client(self) -> Client:
        """Requests are promised their class if it asks for no shorter time to first token than the target."""
        return Client(slo=self.slo.name, promised=self.slo.ttft is not None and self.slo.ttft >= self.target.ttft)

    def load(self, rate: float) -> Load:
        if self.trace:
            factor = rate_of(self.trace) / rate
            arrivals = [arrival._replace(at=arrival.at * factor) for arrival in self.trace]
            return Load(arrivals, 0.0, arrivals[-1].at)
        # A queue that grows since the rate is PRECISION times too high must exceed the target meanwhile.
        seconds = max(self.seconds, FEWEST_REQUESTS / rate, self.target.ttft / (PRECISION - 1))
        arrivals = bursts(rate, WARM_UP + seconds, self.shape, self.client, cv=self.cv, prefix=self.prefix)
        return Load(arrivals, WARM_UP, seconds)

    def alone(self) -> list[Arrival]:
        """Return some of the requests, so far apart that none meets another."""
        some = self.trace[:ALONE] or poisson(1.0, float(ALONE), self.shape, self.client, prefix=self.prefix)
        return [each._replace(at=1000.0 * i, num_outputs=min(each.num_outputs, 8)) for i, each in enumerate(some)]


def rate_of(trace: Sequence[Arrival]) -> float:
    """Return the requests a second of a trace. Raises ConfigError if all arrive at once."""
    if trace[-1].at <= 0:
        raise ConfigError("trace has requests at 0 s only: it must last for some time, so that it has a rate", param="trace")
    return len(trace) / trace[-1].at


class Card(NamedTuple):
    key: CostKey
    machine: Machine


def run(
    costs: Sequence[Path],
    *,
    rate: float | None = None,
    shape: str = "chat",
    trace: Path | None = None,
    ttft_ms: float,
    gap_ms: float,
    share: float = SHARE,
    prefix: int = 0,
    cv: float = 1.0,
    seconds: float = SECONDS,
    kv_tokens: Sequence[int] = (),
    batching: BatchingPolicy = "auto",
    record: Path | None = None,
) -> PlanLine:
    """Print a table for each cost file and the answer in a sentence on stderr, and a JSON line on stdout.

    Raises ConfigError for a value that cannot be, or if no rate keeps the targets on any card.
    """
    _check(ttft_ms=ttft_ms, gap_ms=gap_ms, seconds=seconds, cv=cv)
    if not 0 < share <= 1:
        raise ConfigError(f"share is {share}: it must be more than 0 and at most 1", param="share")
    if prefix < 0:
        raise ConfigError(f"prefix is {prefix}: it must be at least 0 tokens", param="prefix")
    recorded = [] if trace is None else read_trace(trace)
    wanted = Wanted(shape_of(shape), Target(ttft_ms / 1e3, gap_ms / 1e3), share, prefix, cv, seconds, recorded)
    if rate is None:
        if not recorded:
            raise ConfigError("rate is missing: name the requests a second to serve, or a trace, which has its own", param="rate")
        rate = rate_of(recorded)
    _check(rate=rate)
    cards = _cards(costs, kv_tokens, batching)
    lines.check_record(record)
    console = Console(stderr=True)
    planned = [_plan(card, rate, wanted, console) for card in cards]
    failed = [f"{card.device} ({card.model}): {card.why_not}" for card in planned if card.why_not is not None]
    if len(failed) == len(planned):
        raise ConfigError("; ".join(failed), param="ttft_ms")
    for text in failed:
        _say(console, text)
    line = PlanLine(
        date=lines.today(),
        commit=lines.commit(),
        workload=shape if trace is None else f"trace {trace.name}",
        rate=round(rate, 3),
        ttft_ms=ttft_ms,
        gap_ms=gap_ms,
        share=share,
        prefix=prefix,
        cv=cv,
        batching=batching,
        cards=planned,
        command=lines.command(),
    )
    _say(console, answer(line))
    lines.write(line, record)
    return line


def answer(line: PlanLine) -> str:
    """Return the result in a sentence, the card with the fewest replicas first."""
    found = sorted((card for card in line.cards if card.replicas), key=lambda card: (card.replicas, -card.kept_rate))
    texts = [
        f"{card.replicas} {'replica' if card.replicas == 1 else 'replicas'} of {card.device} ({card.model}, {card.precision}), "
        f"{'which' if card.replicas == 1 else 'each of which'} keeps {card.kept_rate:.3g} requests/s"
        for card in found
    ]
    targets = f"{line.share:.3%}".rstrip("0%").rstrip(".") + f"% within TTFT {line.ttft_ms:g} ms and gaps of {line.gap_ms:g} ms"
    return f"For {line.rate:g} requests/s of {line.workload}, {targets}: {', or '.join(texts)}."


def _check(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} is {value}: it must be a finite number above 0", param=name)


def _cards(costs: Sequence[Path], kv_tokens: Sequence[int], batching: BatchingPolicy) -> list[Card]:
    if not costs:
        raise ConfigError("costs is missing: name a cost file, which `tidegate bench cost` writes", param="costs")
    if len(kv_tokens) not in (0, 1, len(costs)):
        raise ConfigError(
            f"kv_tokens is given {len(kv_tokens)} times for {len(costs)} cost files: give it once, or once for each",
            param="kv_tokens",
        )
    held = list(kv_tokens) or [Machine("").kv_tokens]
    for tokens in held:
        if tokens < 1:
            raise ConfigError(f"kv_tokens is {tokens}: it must be at least 1", param="kv_tokens")
    held = held * len(costs) if len(held) == 1 else held
    keys = [load_costs(path, setting="costs").key for path in costs]
    machines = [Machine(path, policy=batching, kv_tokens=tokens) for path, tokens in zip(costs, held, strict=True)]
    return [Card(key, machine) for key, machine in zip(keys, machines, strict=True)]


def _plan(card: Card, rate: float, wanted: Wanted, console: Console) -> PlannedCard:
    _say(console, f"{card.key.device}, {card.key.model}, {card.key.precision}; class {wanted.slo.name}")
    why_not, kept = _impossible(card.machine, wanted), 0.0
    rates: list[PlannedRate] = []
    if why_not is None:
        _say(console, _HEAD)
        kept, rates = highest_rate(card.machine, wanted, console)
        why_not = None if kept else f"no rate from {LOWEST_RATE:.3g} requests/s on keeps it"
    return PlannedCard(
        device=card.key.device,
        model=card.key.model,
        precision=card.key.precision,
        kv_tokens=card.machine.kv_tokens,
        kept_rate=round(kept, 3),
        replicas=math.ceil(rate / kept - 1e-9) if kept else 0,
        why_not=why_not,
        rates=sorted(rates, key=lambda each: each.rate),
    )


def _impossible(machine: Machine, wanted: Wanted) -> str | None:
    """Say why an idle replica does not keep the targets. None if it does."""
    run = simulate(wanted.alone(), machine._replace(noise=0.0))
    found = outcome(run.served, 1.0, wanted.target)
    if found.good >= wanted.share * found.sent:
        return None
    firsts, gaps = (sorted(getattr(one, name) for one in run.served) for name in ("ttft", "longest_gap"))
    place = max(0, math.ceil(wanted.share * len(firsts)) - 1)
    if firsts[place] > wanted.target.ttft:
        return (
            f"no rate keeps it: the prompt alone takes {1e3 * firsts[place]:.3g} ms for {wanted.share:.4g} of the requests, and "
            f"ttft_ms is {1e3 * wanted.target.ttft:g}: allow more, or ask for a smaller share"
        )
    return (
        f"no rate keeps it: a token alone takes {1e3 * gaps[place]:.3g} ms, and gap_ms is {1e3 * wanted.target.gap:g}: allow more"
    )


def highest_rate(machine: Machine, wanted: Wanted, console: Console) -> tuple[float, list[PlannedRate]]:
    """Return the highest rate that one replica keeps, or 0, and what came of all rates that were tried."""
    tried: list[PlannedRate] = []

    def keeps(rate: float) -> bool:
        found = _try(machine, wanted, rate)
        tried.append(found)
        _say(console, _row(found))
        return found.good_share >= wanted.share

    low, high = 0.0, FIRST_RATE
    while keeps(high):
        low, high = high, 2 * high
        if high > HIGHEST_RATE:
            return low, tried
    while not low and high > LOWEST_RATE:
        low, high = (high / 2, high) if keeps(high / 2) else (0.0, high / 2)
    while low and high / low > PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low, tried


def _try(machine: Machine, wanted: Wanted, rate: float) -> PlannedRate:
    load = wanted.load(rate)
    # By then the first token of every good request has come. Those that still run are judged by their tokens so far.
    run = simulate(load.arrivals, machine, until=load.judged_from + load.seconds + wanted.target.ttft)
    judged = [one for one in run.served if one.arrival.at >= load.judged_from]
    begun = [one for one in judged if one.first is not None]
    good = sum(one.in_time(*wanted.target) and one.finish is not FinishReason.ABORT for one in begun)
    return PlannedRate(
        rate=round(rate, 3),
        good_share=round(good / len(judged), 4) if judged else 0.0,
        goodput=round(good / load.seconds, 2),
        ttft_p99_ms=round(1e3 * percentile((one.ttft for one in begun), 99), 1) if begun else None,
        gap_p99_ms=round(1e3 * percentile((one.longest_gap for one in begun), 99), 1) if begun else None,
        refused=sum(one.refused is not None for one in judged),
        busy=round(run.busy, 3),
    )


def _row(found: PlannedRate) -> str:
    times = ("" if value is None else f"{value:,.0f}" for value in (found.ttft_p99_ms, found.gap_p99_ms))
    share, busy = f"{found.good_share:.1%}", f"{found.busy:.0%}"
    return _ROW.format(f"{found.rate:.2f}", share, f"{found.goodput:.2f}", *times, found.refused, busy)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
