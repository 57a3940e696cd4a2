"""Lists the options that `run` and `compare` share, and makes the loads that they describe. Impossible shapes raise LoadError."""

from __future__ import annotations

import dataclasses
import secrets
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.slo import SLO_CLASSES
from loadtest import options
from loadtest.options import Slo
from loadtest.plan import Plan, growth
from loadtest.spec import SHAPES, Lengths, Load, LoadError, Sessions
from loadtest.trace import read_lengths, read_trace

_SHAPE, _LENGTHS, _CLIENTS, _SENDING, _RESULTS = "Load", "Lengths", "Clients", "Requests", "Results"
_WARM_UP = 5.0
_SEEDS = 1_000_000_000
DEFAULT_SLOS = ("ttft=500,gap=50", "ttft=500,tpot=50", "ttft=500,tpot=30", "ttft=200,tpot=20")


def _option(panel: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **more)


@dataclasses.dataclass(frozen=True)
class Flags:
    """Each field is an option of the command line."""

    rate: Annotated[
        str | None, _option(_SHAPE, help="Open loop, requests/s: 20, or 20,30 one after the other; 10:80:10 steps; 10-80 ramp")
    ] = None
    back: Annotated[bool, _option(_SHAPE, "--back", help="Let a rate that moves go back the same way")] = False
    burstiness: Annotated[float, _option(_SHAPE, help="Shape of the gamma intervals: 1 is Poisson, 0.25 comes in bursts")] = 1.0
    trace: Annotated[
        Path | None,
        _option(_SHAPE, metavar="FILE", help="Open loop: JSON lines with at, prompt_tokens, output_tokens[, slo_class]"),
    ] = None
    speed: Annotated[float, _option(_SHAPE, help="Play the trace this many times as fast")] = 1.0
    concurrency: Annotated[
        str | None, _option(_SHAPE, help="Closed loop: requests at a time; 16,64 runs one after the other")
    ] = None
    sessions: Annotated[int | None, _option(_SHAPE, help="Agents at a time, each with turns on a growing context")] = None
    turns: Annotated[int, _option(_SHAPE, help="Turns of a session")] = 40
    context: Annotated[int, _option(_SHAPE, help="Tokens that a session's context grows to")] = 80_000
    think: Annotated[float, _option(_SHAPE, help="Mean seconds between an answer and the next turn")] = 2.0
    fork: Annotated[float, _option(_SHAPE, help="Probability that a turn starts a second session on the same context")] = 0.0
    fork_turns: Annotated[int, _option(_SHAPE, help="Most turns of such a second session")] = 4
    seconds: Annotated[float, _option(_SHAPE, help="Seconds of the load, or of each step or ramp of the rate")] = 60.0
    requests: Annotated[int | None, _option(_SHAPE, help="End after this many requests (or sessions), warm-up included")] = None
    warm_up: Annotated[
        float | None, _option(_SHAPE, help=f"Seconds of load before the measurement; {_WARM_UP:g}, of a trace 0")
    ] = None

    shape: Annotated[
        str | None, _option(_LENGTHS, help=f"Lengths of prompts and answers: {', '.join(SHAPES)}. Default: chat")
    ] = None
    prompt: Annotated[str | None, _option(_LENGTHS, help="N, uniform:LOW:HIGH or lognormal:MU:SIGMA:LOW:HIGH, in tokens")] = None
    output: Annotated[str | None, _option(_LENGTHS, help="The same for answers")] = None
    lengths: Annotated[
        Path | None, _option(_LENGTHS, metavar="FILE", help="JSON lines with prompt_tokens and output_tokens to draw from")
    ] = None
    prefix: Annotated[int, _option(_LENGTHS, help="Tokens that prompts share, before their own")] = 0
    prefixes: Annotated[int, _option(_LENGTHS, help="Number of different shared prefixes")] = 1

    cancel: Annotated[float, _option(_CLIENTS, help="Share of the requests that the client cancels")] = 0.0
    cancel_after: Annotated[str, _option(_CLIENTS, help="Seconds until it does: 2, or 0.1:2 for a random time")] = "0.1:2"
    slow: Annotated[float, _option(_CLIENTS, help="Share of the requests whose client reads slowly")] = 0.0
    slow_bytes: Annotated[float, _option(_CLIENTS, help="Bytes per second that such a client reads")] = 200.0

    slo_class: Annotated[str | None, _option(_SENDING, help=f"SLO class to ask for: {', '.join(SLO_CLASSES)}")] = None
    deadline_ms: Annotated[int | None, _option(_SENDING, help="Deadline to ask for")] = None
    temperature: Annotated[float, _option(_SENDING, help="Of sampling")] = 0.7
    ignore_eos: Annotated[bool, _option(_SENDING, help="Ask for answers of exactly the planned length")] = True
    timeout: Annotated[float, _option(_SENDING, help="Seconds after which a request has failed")] = 180.0
    seed: Annotated[
        int | None, _option(_SENDING, min=0, help="The same seed makes the same load. Default: random, so that prompts are fresh")
    ] = None

    slo: Annotated[
        list[str] | None,
        _option(_RESULTS, help="Limits in ms that make a request good, such as ttft=500,gap=50; may be repeated"),
    ] = None


def loads_of(flags: Flags) -> list[Load]:
    """Return the measurements that the options describe. Raises LoadError."""
    kinds = {"--rate": flags.rate, "--trace": flags.trace, "--concurrency": flags.concurrency, "--sessions": flags.sessions}
    given = [name for name, value in kinds.items() if value is not None]
    if len(given) != 1:
        raise LoadError(f"give one of {', '.join(kinds)}" + (f", not {' and '.join(given)}" if given else ""))
    _refuse_unused(flags, given[0])
    common = _common(flags)
    shapes: list[dict[str, Any]]
    if flags.rate is not None:
        shapes = [{"steps": steps} for steps in options.rates(flags.rate, flags.seconds, back=flags.back)]
    elif flags.concurrency is not None:
        shapes = [{"concurrency": options.whole(part, "--concurrency")} for part in flags.concurrency.split(",")]
    elif flags.trace is not None:
        shapes = [{"trace": read_trace(flags.trace, speed=flags.speed)}]
    else:
        shapes = [{"sessions": _sessions(flags)}]
    loads = [Load(number=number, **shape, **common) for number, shape in enumerate(shapes)]
    for load in loads:
        _check(load)
    return loads


def slos_of(flags: Flags) -> list[Slo]:
    return [options.slo(text) for text in flags.slo or DEFAULT_SLOS]


# Options that only some shapes have. Given with another shape they would do nothing.
_ONLY_FOR = {
    "back": ("--rate",),
    "burstiness": ("--rate",),
    "speed": ("--trace",),
    "turns": ("--sessions",),
    "context": ("--sessions",),
    "think": ("--sessions",),
    "fork": ("--sessions",),
    "fork_turns": ("--sessions",),
    "seconds": ("--rate", "--concurrency", "--sessions"),
    "shape": ("--rate", "--concurrency", "--sessions"),
    "prompt": ("--rate", "--concurrency", "--sessions"),
    "output": ("--rate", "--concurrency", "--sessions"),
    "lengths": ("--rate", "--concurrency"),
    "cancel": ("--rate", "--trace", "--concurrency"),
    "cancel_after": ("--rate", "--trace", "--concurrency"),
    "slow": ("--rate", "--trace", "--concurrency"),
    "slow_bytes": ("--rate", "--trace", "--concurrency"),
    "prefixes": ("--rate", "--trace", "--concurrency"),
}
_NEEDS = {"cancel_after": "cancel", "slow_bytes": "slow", "fork_turns": "fork", "prefixes": "prefix"}
_EITHER = (("shape", "lengths"), ("prompt", "lengths"), ("output", "lengths"))


def _refuse_unused(flags: Flags, kind: str) -> None:
    """Raise LoadError for an option that would have no effect."""
    set_ones = {field.name for field in dataclasses.fields(flags) if getattr(flags, field.name) != field.default}
    for name in sorted(set_ones):
        if kind not in _ONLY_FOR.get(name, (kind,)):
            raise LoadError(f"{_flag(name)} has no effect with {kind}: it belongs to {' and '.join(_ONLY_FOR[name])}")
        if name in _NEEDS and _NEEDS[name] not in set_ones:
            raise LoadError(f"{_flag(name)} has no effect without {_flag(_NEEDS[name])}")
    for one, other in _EITHER:
        if {one, other} <= set_ones:
            raise LoadError(f"give {_flag(one)} or {_flag(other)}, not both")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _common(flags: Flags) -> dict[str, Any]:
    if flags.slo_class is not None and flags.slo_class not in SLO_CLASSES:
        raise LoadError(f"--slo-class is {flags.slo_class!r}: it must be one of {', '.join(SLO_CLASSES)}")
    prompt, output = lengths_of(flags)
    warm_up = flags.warm_up if flags.warm_up is not None else 0.0 if flags.trace else _WARM_UP
    return {
        "seed": secrets.randbelow(_SEEDS) if flags.seed is None else flags.seed,
        "burstiness": flags.burstiness,
        "seconds": flags.seconds,
        "requests": flags.requests,
        "warm_up": warm_up,
        "prompt": prompt,
        "output": output,
        "pairs": read_lengths(flags.lengths) if flags.lengths else (),
        "prefix": flags.prefix,
        "prefixes": flags.prefixes,
        "cancel": options.share(flags.cancel, "--cancel"),
        "cancel_after": options.span(flags.cancel_after, "--cancel-after"),
        "slow": options.share(flags.slow, "--slow"),
        "slow_bytes": flags.slow_bytes,
        "slo_class": flags.slo_class,
        "deadline_ms": flags.deadline_ms,
        "temperature": flags.temperature,
        "ignore_eos": flags.ignore_eos,
        "timeout": flags.timeout,
    }


def lengths_of(flags: Flags) -> tuple[Lengths, Lengths]:
    """Return the distributions of prompts and answers: those of the shape, unless one is given by itself."""
    name = flags.shape or "chat"
    if name not in SHAPES:
        raise LoadError(f"--shape is {name!r}: it must be one of {', '.join(SHAPES)}")
    prompt, output = SHAPES[name]
    return (
        options.lengths(flags.prompt, "--prompt") if flags.prompt else prompt,
        options.lengths(flags.output, "--output") if flags.output else output,
    )


def _sessions(flags: Flags) -> Sessions:
    assert flags.sessions is not None
    fork = options.share(flags.fork, "--fork")
    return Sessions(flags.sessions, flags.turns, flags.context, flags.think, fork, flags.fork_turns)


_ABOVE_ZERO = ("seconds", "burstiness", "timeout", "slow_bytes")
_AT_LEAST_ONE = ("requests", "prefixes", "deadline_ms")
_NOT_NEGATIVE = ("warm_up", "prefix", "temperature")


def _check(load: Load) -> None:
    """Raise LoadError for a number out of range, or for a shape without requests."""
    for names, least, above in ((_ABOVE_ZERO, 0, True), (_AT_LEAST_ONE, 1, False), (_NOT_NEGATIVE, 0, False)):
        for name in names:
            value = getattr(load, name)
            if value is not None:
                options.number(str(value), _flag(name), least=least, above=above)
    if load.sessions is not None:
        for name in ("num", "turns", "context", "fork_turns"):
            options.whole(str(getattr(load.sessions, name)), "--sessions" if name == "num" else _flag(name))
        options.number(str(load.sessions.think_s), "--think")
        growth(load)
    if load.trace and load.warm_up >= load.trace[-1].at:
        raise LoadError(
            f"the last request of the trace is at {load.trace[-1].at:g} s: nothing is left after --warm-up {load.warm_up:g}"
        )
    if load.steps or load.trace:
        Plan(load).times()
