"""Implements `tidegate bench offline`: it measures how long an engine in this process takes for requests that all arrive at once.

The prefix cache is off, every request runs to its full length, and at most `max_num_seqs` (256) run at a time. The time is from
the submission of the first request to the last token. Start-up and warm-up come before, and are measured separately. The result
is the shortest of several rounds. Each model has one engine for all its workloads. Each workload of a model gives a table row
and a JSON line.
"""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from engine import LLM, SamplingParams
from engine.config import EngineConfig, ModelLimits
from engine.errors import ConfigError
from engine.messages import EngineInfo
from engine.models.families import read_spec
from engine.models.spec import ModelSpec
from engine.request import TokenEvent
from engine.startup import process_seconds
from server.bench import bounds, lines
from server.bench.lines import OfflineLine
from server.bench.workloads import WORKLOADS, Work, build_workload, longest, warm_up_of
from server.settings import Settings

DEFAULT = ("single", "decode64", "mixed256", "prefill")
ROUNDS = 3
_REDRAW_SECONDS = 0.25
_ROW = "{:<24} {:<10} {:>9} {:>12} {:>12} {:>7} {:>8} {:>10}"
_HEAD = _ROW.format("model", "workload", "seconds", "out tok/s", "total tok/s", "steps", "of bound", "start-up s")


class _Job(NamedTuple):
    """Holds one model to measure: its settings, its spec, and its workloads by name."""

    settings: Settings
    config: EngineConfig
    spec: ModelSpec
    workloads: dict[str, list[Work]]


class _Round(NamedTuple):
    seconds: float
    num_steps: int
    exposed_seconds: float


class _Measured(NamedTuple):
    rounds: list[_Round]
    warm_up_seconds: float


class _Engine(NamedTuple):
    llm: LLM
    startup: dict[str, float]
    hardware: bounds.Hardware | None


def run(
    settings: Sequence[Settings], workloads: Sequence[str] = (), *, rounds: int = ROUNDS, record: Path | None = None
) -> list[OfflineLine]:
    """Run the named workloads on the model of each Settings. Each result is a table row on stderr and a JSON line on stdout.

    The JSON lines are also appended to the file `record`. Without names, those workloads of DEFAULT run that fit into the
    model's context. ConfigError is raised before any model is loaded.
    """
    if rounds < 1:
        raise ConfigError(f"rounds is {rounds}: it must be at least 1", param="rounds")
    lines.check_record(record)
    age = process_seconds()
    console = Console(stderr=True)
    jobs = [_job(each, workloads, console) for each in settings]
    _say(console, _HEAD)
    done: list[OfflineLine] = []
    for job in jobs:
        # An engine times its start from when it is built. For the first engine, the time since the process started is added.
        for line in _run_job(job, rounds, console, before=0.0 if done else age):
            _say(console, _row(line))
            lines.write(line, record)
            done.append(line)
        gc.collect()  # free the model's memory for the next one
    return done


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _job(settings: Settings, names: Sequence[str], console: Console) -> _Job:
    config = settings.engine_config()
    spec = read_spec(config.model)
    limits, wanted = spec.limits(), settings.max_model_len
    most = wanted or limits.max_model_len
    chosen = {name: build_workload(name, limits.vocab_size) for name in names or DEFAULT}
    if not names and (fitting := {name: work for name, work in chosen.items() if longest(work) <= most}):
        for name in chosen.keys() - fitting.keys():
            _say(console, f"{spec.architecture}: {name} is left out, it needs a context of {longest(chosen[name])} tokens")
        chosen = fitting
    context = max(_context_of(name, work, limits, wanted) for name, work in chosen.items())
    return _Job(settings, msgspec.structs.replace(config, max_model_len=context), spec, chosen)


def _context_of(workload: str, work: list[Work], limits: ModelLimits, max_model_len: int | None) -> int:
    """Return the context to run a workload with, in tokens. Raises ConfigError if the model's, or max_model_len, is too short."""
    need = longest(work)
    if need > limits.max_model_len:
        fitting = [name for name in WORKLOADS if longest(build_workload(name, limits.vocab_size)) <= limits.max_model_len]
        or_else = f"choose one that fits ({', '.join(fitting)}) or" if fitting else "choose"
        raise ConfigError(
            f"workload {workload} needs a context of {need} tokens, and the model has {limits.max_model_len}: "
            f"{or_else} a model with a longer context",
            param="workload",
        )
    if max_model_len is not None and max_model_len < need:
        raise ConfigError(
            f"max_model_len is {max_model_len}, but workload {workload} needs {need} tokens: set it to {need} or more, "
            "or not at all",
            param="max_model_len",
        )
    return need if max_model_len is None else max_model_len


def _run_job(job: _Job, rounds: int, console: Console, *, before: float) -> Iterator[OfflineLine]:
    """Run all workloads of one model, and yield their results. `before` is the time from the start of the process to the building
    of the engine in seconds, or 0 for later engines."""
    cache = msgspec.structs.replace(job.config.cache, prefix_caching=False, host_tier_bytes=0)
    with LLM(**msgspec.structs.asdict(msgspec.structs.replace(job.config, cache=cache, offline=True))) as llm:
        startup = dict(llm.info.startup)
        startup["imports"] += before
        engine = _Engine(llm, startup, _hardware(job.config, llm.info))
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in startup.items())
        _say(console, f"{llm.info.model} on {llm.info.device}: ready after {sum(startup.values()):.1f} s ({phases})")
        for name, work in job.workloads.items():
            began = time.perf_counter()
            for part in warm_up_of(work, job.settings.max_num_seqs):
                _generate(llm, part, None)
            warm_up = time.perf_counter() - began
            yield _line(job, name, engine, _Measured([_run_round(llm, work, name, console) for _ in range(rounds)], warm_up))


def _hardware(config: EngineConfig, info: EngineInfo) -> bounds.Hardware | None:
    """Measure the speed of the CUDA device; None if there is none. Call this once the engine is ready, because measuring
    earlier would lengthen the engine's measured start."""
    if config.runner != "torch" or info.device.startswith("CPU"):
        return None
    return bounds.Hardware(*importlib.import_module("engine.kernels.hardware").measure())


def _line(job: _Job, workload: str, engine: _Engine, measured: _Measured) -> OfflineLine:
    best, info = min(measured.rounds), engine.llm.info
    work, hardware = job.workloads[workload], engine.hardware
    outputs, prompts = sum(w.num_outputs for w in work), sum(len(w.prompt) for w in work)
    precision = _precision(job.settings.dtype, info.limits.dtype, info.device)
    share = None
    if hardware is not None:
        lengths = [bounds.Length(len(w.prompt), w.num_outputs) for w in work]
        bound = bounds.workload_seconds(
            job.spec,
            lengths,
            hardware,
            number_size=bounds.SIZES[precision],
            max_tokens=info.max_step_tokens,
            max_rows=info.max_num_seqs,
        )
        share = round(bound / best.seconds, 3)
    return OfflineLine(
        date=lines.today(),
        commit=lines.commit(),
        device=info.device,
        model=info.model,
        precision=precision,
        workload=workload,
        seconds=round(best.seconds, 3),
        out_tok_s=round(outputs / best.seconds, 1),
        total_tok_s=round((outputs + prompts) / best.seconds, 1),
        startup_s=round(sum(engine.startup.values()), 2),
        bound_share=share,
        command=lines.command(),
        num_requests=len(work),
        prompt_tokens=prompts,
        output_tokens=outputs,
        num_steps=best.num_steps,
        exposed_cpu_s=round(best.exposed_seconds, 3),
        load_format=job.settings.load_format,
        rounds=[round(r.seconds, 3) for r in measured.rounds],
        warm_up_s=round(measured.warm_up_seconds, 2),
        startup={phase: round(seconds, 3) for phase, seconds in engine.startup.items()},
        bandwidth=None if hardware is None else round(hardware.bandwidth),
        rate=None if hardware is None else round(hardware.rate),
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


def _precision(dtype: str, of_checkpoint: str, device: str) -> str:
    if dtype != "auto":
        return dtype
    return "float32" if device.startswith("CPU") else of_checkpoint


def _row(line: OfflineLine) -> str:
    share = "" if line.bound_share is None else f"{line.bound_share:.0%}"
    return _ROW.format(
        line.model,
        line.workload,
        f"{line.seconds:.2f}",
        f"{line.out_tok_s:,.0f}",
        f"{line.total_tok_s:,.0f}",
        f"{line.num_steps:,}",
        share,
        f"{line.startup_s:.1f}",
    )
