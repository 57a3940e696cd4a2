"""`tidegate bench offline`: how fast an engine in this process works off a workload that is all there at once.

The prefix cache is off, every request runs to its full length, and at most 256 run at a time. Time counts from the
submission of the first request to the last token; start-up and a warm-up are measured apart and before.
"""

from __future__ import annotations

import datetime
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from engine import LLM, CacheConfig, SamplingParams, SchedulerConfig
from engine.config import Device, DType, LoadFormat
from engine.errors import ConfigError
from engine.request import TokenEvent

MAX_NUM_SEQS = 256
_WARM_UP_REQUESTS = 16
_WARM_UP_TOKENS = 8
_REDRAW_SECONDS = 0.25


class Work(NamedTuple):
    prompt: list[int]
    num_outputs: int


def mixed(n: int, *, low: int = 100, high: int = 1024, vocab: int = 10_000, seed: int = 0) -> list[Work]:
    """`n` requests whose prompt and output lengths are each drawn from low..high; all prompts are drawn before any output."""
    draw = random.Random(seed).randint
    prompts = []
    for _ in range(n):
        length = draw(low, high)
        prompts.append([draw(0, vocab) for _ in range(length)])
    return [Work(prompt, draw(low, high)) for prompt in prompts]


def fixed(n: int, num_prompt: int, num_outputs: int, *, vocab: int = 10_000, seed: int = 1) -> list[Work]:
    draw = random.Random(seed).randint
    return [Work([draw(0, vocab) for _ in range(num_prompt)], num_outputs) for _ in range(n)]


# The same token lists for every engine that is measured on them: a changed seed or order makes old figures incomparable.
WORKLOADS: dict[str, Callable[[], list[Work]]] = {
    "single": lambda: fixed(1, 1024, 256),
    "decode64": lambda: fixed(64, 128, 256),
    "mixed256": lambda: mixed(256),
    "mixed1024": lambda: mixed(1024),
    "prefill": lambda: fixed(32, 8192, 1),
}


class BenchLine(msgspec.Struct, kw_only=True):
    """The result as one JSON line. `bound_share` is the share of the hardware's bound, where that is known."""

    date: str
    commit: str
    device: str
    engine: str = "tidegate"
    model: str
    precision: str
    workload: str
    seconds: float
    out_tok_s: float
    total_tok_s: float
    startup_s: float
    bound_share: float | None
    command: str
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    num_steps: int
    exposed_cpu_s: float
    load_format: str


def offline(
    model: str,
    workload: str,
    *,
    load_format: LoadFormat = "safetensors",
    precision: DType = "auto",
    device: Device = "auto",
) -> BenchLine:
    """Run `workload`, draw the table on stderr, and print the line on stdout, last."""
    work = build_workload(workload)
    console = Console(stderr=True)
    began = time.perf_counter()
    with LLM(
        model,
        load_format=load_format,
        dtype=precision,
        device=device,
        max_model_len=max(len(w.prompt) + w.num_outputs for w in work),
        cache=CacheConfig(prefix_caching=False),
        scheduler=SchedulerConfig(max_num_seqs=MAX_NUM_SEQS),
    ) as llm:
        startup = time.perf_counter() - began
        console.print(f"{llm.info.model} on {llm.info.device}: up in {startup:.1f} s; warming up")
        _generate(llm, [Work(w.prompt, min(w.num_outputs, _WARM_UP_TOKENS)) for w in work[:_WARM_UP_REQUESTS]], None)
        before = llm.stats()
        seconds = _measure(llm, work, workload, console)
        after, info = llm.stats(), llm.info
    outputs, prompts = sum(w.num_outputs for w in work), sum(len(w.prompt) for w in work)
    line = BenchLine(
        date=datetime.date.today().isoformat(),
        commit=_commit(),
        device=info.device,
        model=info.model,
        precision=_precision(precision, info.limits.dtype, info.device),
        workload=workload,
        seconds=round(seconds, 3),
        out_tok_s=round(outputs / seconds, 1),
        total_tok_s=round((outputs + prompts) / seconds, 1),
        startup_s=round(startup, 2),
        bound_share=None,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        num_requests=len(work),
        prompt_tokens=prompts,
        output_tokens=outputs,
        num_steps=after.step - before.step,
        exposed_cpu_s=round(after.exposed_cpu_seconds - before.exposed_cpu_seconds, 3),
        load_format=load_format,
    )
    console.print(_table(line))
    sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
    return line


def build_workload(name: str) -> list[Work]:
    if name not in WORKLOADS:
        raise ConfigError(f"workload is {name!r}: it must be one of {', '.join(WORKLOADS)}", param="workload")
    return WORKLOADS[name]()


def _measure(llm: LLM, work: list[Work], name: str, console: Console) -> float:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task(name, total=sum(w.num_outputs for w in work))
        done, redraw_at = 0, time.perf_counter() + _REDRAW_SECONDS

        def progress(_: int, event: TokenEvent) -> None:
            nonlocal done, redraw_at
            done += len(event.tokens)
            if (now := time.perf_counter()) >= redraw_at:
                redraw_at = now + _REDRAW_SECONDS
                bar.update(task, completed=done, refresh=True)

        began = time.perf_counter()
        _generate(llm, work, progress)
        return time.perf_counter() - began


def _generate(llm: LLM, work: list[Work], progress: Callable[[int, TokenEvent], None] | None) -> None:
    params = [SamplingParams(temperature=0.0, max_tokens=w.num_outputs, ignore_eos=True) for w in work]
    llm.generate([w.prompt for w in work], params, progress=progress)


def _precision(asked: str, of_checkpoint: str, device: str) -> str:
    if asked != "auto":
        return asked
    return "float32" if device.startswith("CPU") else of_checkpoint


def _commit() -> str:
    """Of the source tree that this runs from; an installed copy has none."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _table(line: BenchLine) -> Table:
    table = Table(title=f"{line.model}, {line.workload}: {line.num_requests} requests on {line.device}, {line.precision}")
    for name in ("seconds", "output tok/s", "total tok/s", "steps", "start-up s"):
        table.add_column(name, justify="right")
    table.add_row(
        f"{line.seconds:.2f}",
        f"{line.out_tok_s:,.0f}",
        f"{line.total_tok_s:,.0f}",
        f"{line.num_steps:,}",
        f"{line.startup_s:.1f}",
    )
    return table
