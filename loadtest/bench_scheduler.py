"""Measures the CPU time of a decode step in the scheduler: schedule plus commit, without a runner or a device.

    python -m loadtest.bench_scheduler [--requests 256] [--steps 2000] [--rounds 5]

Only the scheduler is timed; the tokens of a step are made outside the measured time. Prompt lengths are staggered, so that in
each step some requests need a new block. The result is the mean over all steps of the median round, and includes garbage
collection, block growth and the publication of full blocks. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

from engine.config import CacheConfig, EngineConfig, ModelLimits, SchedulerConfig, resolve
from engine.plan import StepPlan, StepResult
from engine.request import Request, SamplingParams
from engine.scheduler.limits import StepLimits
from engine.scheduler.scheduler import Scheduler

LIMITS = ModelLimits(max_model_len=1 << 20, vocab_size=32000, eos_token_ids=(2,), dtype="bfloat16")
PROMPT_LEN = 128
BLOCK_SIZE = 64


@dataclass(frozen=True, slots=True)
class Round:
    schedule_us: list[float]
    commit_us: list[float]

    @property
    def step_us(self) -> list[float]:
        return [a + b for a, b in zip(self.schedule_us, self.commit_us, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of a scheduler step.")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    began = time.perf_counter()
    rounds = [_run(args.requests, args.steps, overlap) for _ in range(args.rounds) for overlap in (False, True)]
    plain, overlapped = _middle(rounds[0::2]), _middle(rounds[1::2])
    print(f"{args.requests} decoding requests, {args.steps} steps, median of {args.rounds} rounds; microseconds a step")
    print(f"{'':12}{'schedule':>10}{'commit':>10}{'both':>10}{'p50':>10}{'p99':>10}{'a request':>12}")
    for name, one in (("plain", plain), ("overlapped", overlapped)):
        mean = statistics.mean(one.step_us)
        print(
            f"{name:12}{statistics.mean(one.schedule_us):10.1f}{statistics.mean(one.commit_us):10.1f}{mean:10.1f}"
            f"{statistics.median(one.step_us):10.1f}{_p99(one.step_us):10.1f}{mean / args.requests:12.3f}"
        )
    print(json.dumps(_line(args, overlapped, plain, time.perf_counter() - began)))


def _run(num_requests: int, steps: int, overlap: bool) -> Round:
    scheduler, limits = _running(num_requests, steps)
    schedule_us, commit_us = [], []
    previous: StepPlan | None = scheduler.schedule(limits) if overlap else None
    for _ in range(steps):
        start = time.perf_counter()
        plan = scheduler.schedule(limits)
        scheduled = time.perf_counter()
        due = previous if overlap else plan
        if plan is None or due is None or due.num_decodes != num_requests:
            raise SystemExit("a step did not decode all requests: the benchmark is wrong")
        result = StepResult(due.step, [7] * num_requests)
        ready = time.perf_counter()
        events = scheduler.commit(due, result)
        committed = time.perf_counter()
        del events
        schedule_us.append((scheduled - start) * 1e6)
        commit_us.append((committed - ready) * 1e6)
        previous = plan
    return Round(schedule_us, commit_us)


def _running(num_requests: int, steps: int) -> tuple[Scheduler, StepLimits]:
    """Return a scheduler whose requests have all computed their prompts, and the limits of its steps."""
    length = PROMPT_LEN + BLOCK_SIZE + steps + 8
    num_blocks = num_requests * (length // BLOCK_SIZE + 2) + 1
    tokens = num_requests * (PROMPT_LEN + BLOCK_SIZE)
    limits = StepLimits(tokens, num_requests, tokens)
    config = EngineConfig(
        model="none",
        cache=CacheConfig(block_size=BLOCK_SIZE, num_blocks=num_blocks),
        scheduler=SchedulerConfig(max_num_seqs=num_requests, max_step_tokens=tokens),
    )
    scheduler = Scheduler(resolve(config, LIMITS, has_cuda=False), num_blocks)
    for i in range(num_requests):
        prompt = [i % 1000] * (PROMPT_LEN + i % BLOCK_SIZE)
        params = SamplingParams(max_tokens=steps + 8)
        scheduler.add(Request(str(i), prompt, params, num_prompt=len(prompt), seed=i, eos_token_ids=(2,), max_model_len=length))
    plan = scheduler.schedule(limits)
    if plan is None:
        raise SystemExit("nothing was admitted")
    scheduler.commit(plan, StepResult(plan.step, [7] * len(plan.samples)))
    return scheduler, limits


def _middle(rounds: list[Round]) -> Round:
    return sorted(rounds, key=lambda one: statistics.mean(one.step_us))[len(rounds) // 2]


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def _line(args: argparse.Namespace, overlapped: Round, plain: Round, seconds: float) -> dict[str, object]:
    step_us = statistics.mean(overlapped.step_us)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": f"CPU {platform.machine()}, Python {platform.python_version()}",
        "engine": "tidegate",
        "workload": f"decode{args.requests} schedule+commit",
        "seconds": round(seconds, 2),
        "step_us": round(step_us, 1),
        "step_us_p99": round(_p99(overlapped.step_us), 1),
        "step_us_p50": round(statistics.median(overlapped.step_us), 1),
        "step_us_plain": round(statistics.mean(plain.step_us), 1),
        "schedule_us": round(statistics.mean(overlapped.schedule_us), 1),
        "commit_us": round(statistics.mean(overlapped.commit_us), 1),
        "us_per_request": round(step_us / args.requests, 3),
        "command": " ".join(["python -m loadtest.bench_scheduler", *sys.argv[1:]]),
    }


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
