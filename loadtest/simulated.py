"""Studies the policies of the batch in simulation, on the step costs of an H200 with llama-8b (docs/batching.md).

    python -m loadtest.simulated [--part PART ...] [--seconds 60] [--costs FILE] [--record FILE]

Each result is a table row and a JSON line. A part takes about a minute of CPU time.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec

from engine.config import BatchingPolicy
from engine.scheduler.cost_file import CostKey, load_costs, save_costs
from engine.scheduler.cost_table import CostTable
from server.bench import lines
from server.bench.loads import SHAPES, Arrival, Client, merge, poisson, random_tokens, steps
from server.bench.outcomes import outcome, percentile, phase
from server.bench.simulate import Machine, Run, Served, limits_over_time, simulate

COSTS = Path(__file__).parent / "costs" / "h200-llama-8b-bf16.json"
RATES = (20, 30, 36, 40, 80)
CHAT = SHAPES["chat"]
Row = dict[str, Any]
Study = Callable[[Machine, float], Iterator[Row]]


def machines(base: Machine) -> dict[str, Machine]:
    def of(policy: BatchingPolicy, **changes: Any) -> Machine:
        return base._replace(policy=policy, **changes)

    return {
        "fixed 64": of("fixed", max_num_seqs=64),
        "fixed 256": of("fixed"),
        "aimd": of("aimd"),
        "model": of("model"),
        "auto, no file": of("auto", cold=True),
    }


def interactive(tenant: str = "", *, promised: bool) -> Client:
    return Client(tenant, "interactive", promised)


def rates(base: Machine, seconds: float) -> Iterator[Row]:
    """Chat requests at rising rates: goodput, the tails of both latencies, and refusals."""
    for promised in (True, False):
        for rate in RATES:
            load = poisson(rate, seconds, CHAT, interactive(promised=promised), seed=7 + 1000 * rate)
            for name, machine in machines(base).items():
                run = simulate(load, machine)
                yield {"policy": name, "promised": promised, "rate": rate, **summary(run, seconds)}


def summary(run: Run, seconds: float) -> Row:
    found = outcome(run.served, seconds)
    return {
        "sent_s": round(found.sent / seconds, 2),
        "goodput": found.goodput,
        "goodput_after_2s": outcome([one for one in run.served if one.arrival.at >= 2], seconds - 2).goodput,
        "refused": found.refused,
        "ttft_p50_ms": found.ttft_ms["p50"],
        "ttft_p99_ms": found.ttft_ms["p99"],
        "gap_p50_ms": found.gap_ms["p50"],
        "gap_p99_ms": found.gap_ms["p99"],
        "tpot_p50_ms": found.tpot_ms["p50"],
        "refusal_p99_ms": found.refusal_ms.get("p99"),
        "out_tok_s": found.out_tok_s,
        "busy": round(run.busy, 2),
        "simulated_s_per_cpu_s": round(run.seconds / run.cpu_seconds, 1),
    }


def burst(base: Machine, _: float) -> Iterator[Row]:
    """256 streams of 400 tokens begin at once, on the device of the cost file and on one whose steps all take 25 ms."""
    with tempfile.TemporaryDirectory() as folder:
        flat = Path(folder) / "25 ms"
        save_costs(
            flat, CostKey("25 ms", "any", "any"), "made up", CostTable([256], [0.025], [16, 8192], [0.025, 0.025], 0.0, 0.0, 0.0)
        )
        for costs, num_prompt in ((flat, 6), (base.costs, 6), (base.costs, 400)):
            rng = random.Random(1)
            load = [Arrival(0.0, random_tokens(rng, num_prompt), 400, interactive(promised=False)) for _ in range(256)]
            for name, machine in machines(base._replace(costs=costs)).items():
                run = simulate(load, machine)
                below = [at for at, stats in run.samples if stats.seq_limit < 256]
                yield {
                    "device": Path(costs).stem,
                    "prompt_tokens": num_prompt,
                    "policy": name,
                    "out_tok_s": round(256 * 400 / run.seconds),
                    "below_256_places_until_s": round(max(below, default=0.0), 2),
                }


def load_steps(base: Machine, seconds: float) -> Iterator[Row]:
    """10 requests a second become 80 and 10 again: step times, and how soon limits settle."""
    third = seconds / 3
    load = steps([(10, third), (80, third), (10, third)], CHAT, interactive(promised=True))
    for name, machine in machines(base).items():
        run = simulate(load, machine)
        for number, rate in enumerate((10, 80, 10)):
            begin, end = number * third, (number + 1) * third
            part = [one for one in run.served if begin <= one.arrival.at < end]
            steady = phase(run, begin + 3, end).changes / (third - 3)
            goodput = outcome(part, third).goodput
            found = phase(run, begin, end)._asdict()
            yield {
                "policy": name,
                "part": number,
                "rate": rate,
                **found,
                "changes_s_steady": round(steady, 2),
                "goodput": goodput,
                "limits": [entry for entry in limits_over_time(run) if begin <= entry["at"] < end],
            }


def flood(base: Machine, seconds: float) -> Iterator[Row]:
    """One tenant sends ten times its share of what the device keeps; the other goes on as before."""
    share = 18.0
    for promised in (True, False):
        calm, before = poisson(share, seconds, CHAT, interactive("calm", promised=promised), seed=1), 0.0
        for times in (1, 10):
            other = poisson(times * share, seconds, CHAT, interactive("flood", promised=promised), seed=2)
            run = simulate(merge(calm, other), base._replace(policy="model"))
            found = {tenant: outcome(of_tenant(run, tenant), seconds) for tenant in ("calm", "flood")}
            p99 = found["calm"].ttft_ms["p99"]
            before = before or p99
            yield {
                "promised": promised,
                "flood_times": times,
                "calm_ttft_p50_ms": found["calm"].ttft_ms["p50"],
                "calm_ttft_p99_ms": p99,
                "ratio": round(p99 / before, 2),
                "calm_sent": found["calm"].sent,
                "calm_refused": found["calm"].refused,
                "calm_goodput": found["calm"].goodput,
                "flood_sent": found["flood"].sent,
                "flood_refused": found["flood"].refused,
                "flood_goodput": found["flood"].goodput,
            }


def of_tenant(run: Run, tenant: str) -> list[Served]:
    return [one for one in run.served if one.arrival.client.tenant == tenant]


def long_prompt(base: Machine, _: float) -> Iterator[Row]:
    """A prompt of 100,000 tokens beside 64 streams: their time between tokens, and its first token."""
    rng, client = random.Random(3), interactive(promised=False)
    streams = [Arrival(i * 0.02, random_tokens(rng, 300), 3000, client) for i in range(64)]
    long = Arrival(3.0, random_tokens(rng, 100_000), 8, client)
    for name, machine in machines(base._replace(max_num_seqs=256)).items():
        if name == "fixed 64":
            continue  # the long prompt would only wait for a place
        alone = simulate([long], machine).served[0].ttft
        run = simulate([*streams, long], machine)
        ttft = run.served[-1].ttft
        gaps = [gap for one in run.served[:-1] for gap in gaps_between(one, 3.0, 3.0 + ttft)]
        yield {
            "policy": name,
            "alone_s": round(alone, 2),
            "beside_s": round(ttft, 2),
            "ratio": round(ttft / alone, 2),
            "streams_itl_p50_ms": round(1e3 * statistics.median(gaps), 1),
            "streams_itl_p99_ms": round(1e3 * percentile(gaps, 99), 1),
            "streams_itl_max_ms": round(1e3 * max(gaps), 1),
        }


def gaps_between(one: Served, begin: float, end: float) -> list[float]:
    times = accumulate(one.gaps, initial=one.first or 0.0)
    next(times)
    return [gap for gap, at in zip(one.gaps, times, strict=True) if begin < at <= end]


def wrong(base: Machine, seconds: float) -> Iterator[Row]:
    """The controller starts from a cost file that is wrong by a factor."""
    file = load_costs(base.costs, setting="costs")
    load = poisson(30, seconds, CHAT, interactive(promised=True), seed=7 + 30_000)
    for factor in (1 / 3, 0.8, 1.0, 1.25, 3.0):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "believed.json"
            save_costs(path, file.key, f"{file.source} All seconds times {factor}.", scaled(file.table, factor))
            run = simulate(load, base._replace(policy="model", believed=path))
        aimd = [sample.at for sample in run.samples if sample.stats.batching == "aimd"]
        found = summary(run, seconds)
        names = ("sent_s", "goodput", "refused", "ttft_p99_ms", "gap_p99_ms")
        yield {"factor": round(factor, 2), "aimd_until_s": max(aimd, default=None), **{name: found[name] for name in names}}


def scaled(table: CostTable, factor: float) -> CostTable:
    return table._replace(
        decode_seconds=[seconds * factor for seconds in table.decode_seconds],
        step_seconds=[seconds * factor for seconds in table.step_seconds],
        kv_token_seconds=table.kv_token_seconds * factor,
        attention_pair_seconds=table.attention_pair_seconds * factor,
        long_pair_seconds=table.long_pair_seconds * factor,
    )


def check(base: Machine, _: float) -> Iterator[Row]:
    """The requests of the runs on an H200 with which docs/batching.md compares the simulation (`online.jsonl`)."""
    names = ("goodput", "refused", "ttft_ms", "gap_ms", "tpot_ms", "e2e_ms")
    for between in (0.05e-3, base.between, 0.6e-3, 1e-3):
        for rate in RATES:
            load = poisson(rate, 15, CHAT, interactive(promised=True), seed=7 + 1000 * rate)
            found = outcome(simulate(load, base._replace(policy="model", between=between)).served, 15)
            yield {"between_ms": between * 1e3, "rate": rate, **{name: getattr(found, name) for name in names}}


STUDIES: dict[str, Study] = {
    "rates": rates,
    "burst": burst,
    "steps": load_steps,
    "flood": flood,
    "long": long_prompt,
    "wrong": wrong,
    "check": check,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Study the policies of the batch in simulation.")
    parser.add_argument("--part", choices=STUDIES, action="append")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--costs", type=Path, default=COSTS)
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    base = Machine(args.costs)
    head = {"date": lines.today(), "commit": lines.commit(), "device": f"simulated: {args.costs.name}", "engine": "tidegate"}
    for part in args.part or STUDIES:
        for row in STUDIES[part](base, args.seconds):
            text = msgspec.json.encode({**head, "workload": part, "seconds": args.seconds, **row}).decode()
            print(f"{part:6} " + "  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            if args.record is not None:
                with args.record.open("a") as file:
                    file.write(text + "\n")


if __name__ == "__main__":
    main()
