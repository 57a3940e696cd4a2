"""`tidegate bench offline`: how fast an engine in this process works off a workload that is all there at once.

The prefix cache is off, every request runs to its full length, and at most `max_num_seqs` (256) run at a time. Time counts
from the submission of the first request to the last token; start-up and a warm-up are measured apart and before. Of several
rounds the best counts.
"""

from __future__ import annotations

import datetime
import math
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from engine import LLM, SamplingParams
from engine.config import EngineConfig, ModelLimits
from engine.errors import ConfigError
from engine.messages import EngineInfo
from engine.models.spec import ModelSpec
from engine.request import TokenEvent
from server.settings import Settings

VOCAB = 10_000  # ids are drawn from 0 to this, or to the model's last one where it has fewer
_WARM_UP_PROMPT = 8  # tokens of a request in the warm-up, and
_WARM_UP_TOKENS = 8  # those that it generates at least
_WARM_UP_SHRINK = 0.85  # of the requests that still run, each step ends the rest: no size between CUDA graphs is passed over
_REDRAW_SECONDS = 0.25


class Work(NamedTuple):
    prompt: list[int]
    num_outputs: int


def mixed(n: int, *, low: int = 100, high: int = 1024, vocab: int = VOCAB, seed: int = 0) -> list[Work]:
    """`n` requests whose prompt and output lengths are each drawn from low..high; all prompts are drawn before any output."""
    draw = random.Random(seed).randint
    prompts = []
    for _ in range(n):
        length = draw(low, high)
        prompts.append([draw(0, vocab) for _ in range(length)])
    return [Work(prompt, draw(low, high)) for prompt in prompts]


def fixed(n: int, num_prompt: int, num_outputs: int, *, vocab: int = VOCAB, seed: int = 1) -> list[Work]:
    draw = random.Random(seed).randint
    return [Work([draw(0, vocab) for _ in range(num_prompt)], num_outputs) for _ in range(n)]


# The same token lists for every engine that is measured on them: a changed seed or order makes old figures incomparable.
WORKLOADS: dict[str, Callable[[int], list[Work]]] = {  # each takes the highest token id that it may draw
    "single": lambda vocab: fixed(1, 1024, 256, vocab=vocab),
    "decode64": lambda vocab: fixed(64, 128, 256, vocab=vocab),
    "mixed256": lambda vocab: mixed(256, vocab=vocab),
    "mixed1024": lambda vocab: mixed(1024, vocab=vocab),
    "prefill": lambda vocab: fixed(32, 8192, 1, vocab=vocab),
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
    rounds: list[float]  # seconds of each; `seconds` is the least


class _Round(NamedTuple):
    seconds: float
    num_steps: int
    exposed_seconds: float


def offline(settings: Settings, workload: str, *, rounds: int = 1) -> BenchLine:
    """Run `workload`, draw the table on stderr, and print the line on stdout, last. `settings` name a model."""
    if rounds < 1:
        raise ConfigError(f"rounds is {rounds}: it must be at least 1", param="rounds")
    config = settings.engine_config()
    limits = ModelSpec.from_folder(config.model).limits()
    work = build_workload(workload, limits.vocab_size)
    context = _context_of(workload, work, limits, settings.max_model_len)
    console = Console(stderr=True)
    began = time.perf_counter()
    with LLM(**_options(config, context)) as llm:
        startup = time.perf_counter() - began
        console.print(f"{llm.info.model} on {llm.info.device}: up in {startup:.1f} s; warming up")
        for part in warm_up_of(work, settings.max_num_seqs):
            _generate(llm, part, None)
        measured = [_run_round(llm, work, workload, console) for _ in range(rounds)]
        line = _line(settings, workload, work, measured, llm.info)
    line = msgspec.structs.replace(line, startup_s=round(startup, 2))
    console.print(_table(line))
    sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
    return line


def build_workload(name: str, vocab_size: int = VOCAB + 1) -> list[Work]:
    """The same lists for every model of more than 10,000 tokens; ids that a smaller one has for the others."""
    if name not in WORKLOADS:
        raise ConfigError(f"workload is {name!r}: it must be one of {', '.join(WORKLOADS)}", param="workload")
    return WORKLOADS[name](min(VOCAB, vocab_size - 1))


def warm_up_of(work: list[Work], max_num_seqs: int) -> list[list[Work]]:
    """What to run before: the longest prompt, whose steps are the largest, and then as many requests at once as the workload has,
    in few tokens and ever fewer at the end, so that the CUDA graphs of all batch sizes are captured."""
    num = min(len(work), max_num_seqs)
    at_once = []
    for rank, w in enumerate(work[:num], 1):
        extra = int(math.log(num / rank) / -math.log(_WARM_UP_SHRINK))
        at_once.append(Work(w.prompt[:_WARM_UP_PROMPT], min(w.num_outputs, _WARM_UP_TOKENS + extra)))
    longest = max(work, key=lambda w: len(w.prompt))
    return [[Work(longest.prompt, min(longest.num_outputs, _WARM_UP_TOKENS))], at_once]


def _context_of(workload: str, work: list[Work], limits: ModelLimits, asked: int | None) -> int:
    """Tokens of the longest request. Raises ConfigError where the model has no room for it."""
    need = _longest(work)
    if need > limits.max_model_len:
        fitting = [name for name in WORKLOADS if _longest(build_workload(name, limits.vocab_size)) <= limits.max_model_len]
        or_else = f"choose one that fits ({', '.join(fitting)}) or" if fitting else "choose"
        raise ConfigError(
            f"workload {workload} takes a context of {need} tokens, and the model has {limits.max_model_len}: "
            f"{or_else} a model with a longer context",
            param="workload",
        )
    if asked is not None and asked < need:
        raise ConfigError(
            f"max_model_len is {asked}, but workload {workload} takes {need} tokens: set it to {need} or more, or not at all",
            param="max_model_len",
        )
    return need if asked is None else asked


def _longest(work: list[Work]) -> int:
    return max(len(w.prompt) + w.num_outputs for w in work)


def _options(config: EngineConfig, max_model_len: int) -> dict[str, Any]:
    cache = msgspec.structs.replace(config.cache, prefix_caching=False)
    return msgspec.structs.asdict(msgspec.structs.replace(config, max_model_len=max_model_len, cache=cache))


def _line(settings: Settings, workload: str, work: list[Work], rounds: list[_Round], info: EngineInfo) -> BenchLine:
    best = min(rounds)
    outputs, prompts = sum(w.num_outputs for w in work), sum(len(w.prompt) for w in work)
    return BenchLine(
        date=datetime.date.today().isoformat(),
        commit=_commit(),
        device=info.device,
        model=info.model,
        precision=_precision(settings.dtype, info.limits.dtype, info.device),
        workload=workload,
        seconds=round(best.seconds, 3),
        out_tok_s=round(outputs / best.seconds, 1),
        total_tok_s=round((outputs + prompts) / best.seconds, 1),
        startup_s=0.0,
        bound_share=None,
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        num_requests=len(work),
        prompt_tokens=prompts,
        output_tokens=outputs,
        num_steps=best.num_steps,
        exposed_cpu_s=round(best.exposed_seconds, 3),
        load_format=settings.load_format,
        rounds=[round(r.seconds, 3) for r in rounds],
    )


def _run_round(llm: LLM, work: list[Work], workload: str, console: Console) -> _Round:
    before = llm.stats()
    seconds = _measure(llm, work, workload, console)
    after = llm.stats()
    return _Round(seconds, after.step - before.step, after.exposed_cpu_seconds - before.exposed_cpu_seconds)


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
