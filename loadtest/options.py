"""Reads the small languages of the command line: rates, lengths, SLOs. Raises LoadError for a text that means nothing."""

from __future__ import annotations

import math
from typing import NamedTuple

from loadtest.spec import Lengths, LoadError, Step

SLO_FIGURES = ("ttft", "gap", "tpot", "e2e")


class Slo(NamedTuple):
    """Limits in milliseconds by figure. A request is good if it keeps all of them."""

    text: str
    limits: tuple[tuple[str, float], ...]


def number(text: str, option: str, *, least: float = 0.0, above: bool = False) -> float:
    """Return the number that `text` holds: at least `least`, or above it."""
    try:
        value = float(text)
    except ValueError:
        raise LoadError(f"{option} has {text!r}, which is not a number") from None
    if not math.isfinite(value) or value < least or (above and value == least):
        raise LoadError(f"{option} has {text!r}: it must be {'above' if above else 'at least'} {least:g}")
    return value


def whole(text: str, option: str, *, least: int = 1) -> int:
    value = number(text, option, least=least)
    if value != int(value):
        raise LoadError(f"{option} has {text!r}: it must be a whole number")
    return int(value)


def rates(text: str, seconds: float, *, back: bool) -> list[tuple[Step, ...]]:
    """Return the steps of each measurement that `--rate` names.

    "20,30" is two measurements; "10:80:10" is one, whose rate goes from 10 to 80 in steps of 10; "10-80" is one, whose rate
    moves evenly. With `back`, the rate of each measurement goes back the same way.
    """
    return [_with_way_back(_steps(part.strip(), seconds), back) for part in text.split(",")]


def _steps(text: str, seconds: float) -> tuple[Step, ...]:
    option = "--rate"
    if ":" in text:
        parts = text.split(":")
        if len(parts) != 3:
            raise LoadError(f"--rate has {text!r}: steps are written FROM:TO:BY, such as 10:80:10")
        start, end, by = (number(part, option, above=True) for part in parts)
        count = math.floor(abs(end - start) / by + 1e-9) + 1
        signed = math.copysign(by, end - start)
        return tuple(Step(start + i * signed, start + i * signed, seconds) for i in range(count))
    first, dash, last = text.partition("-")
    start = number(first, option, above=not dash)
    end = number(last, option) if dash else start
    if start == end == 0:
        raise LoadError("--rate has 0-0: one of the two rates must be above 0")
    return (Step(start, end, seconds),)


def _with_way_back(steps: tuple[Step, ...], back: bool) -> tuple[Step, ...]:
    if not back:
        return steps
    if len(steps) > 1:
        return steps + steps[-2::-1]
    (only,) = steps
    if only.rate == only.end_rate:
        raise LoadError("--back needs a rate that moves, such as --rate 10:80:10 or --rate 10-80")
    return (only, Step(only.end_rate, only.rate, only.seconds))


def lengths(text: str, option: str, *, least: int = 1) -> Lengths:
    """Read `512`, `uniform:100:1024` or `lognormal:MU:SIGMA:LOW:HIGH`."""
    kind, *rest = text.split(":")
    if not rest:
        value = whole(text, option, least=least)
        return Lengths("fixed", value, value)
    if kind == "uniform" and len(rest) == 2:
        low, high = (whole(part, option, least=least) for part in rest)
        found = Lengths("uniform", low, high)
    elif kind == "lognormal" and len(rest) == 4:
        mean, sigma = number(rest[0], option), number(rest[1], option)
        low, high = (whole(part, option, least=least) for part in rest[2:])
        found = Lengths("lognormal", low, high, mean, sigma)
    else:
        raise LoadError(f"{option} has {text!r}: write N, uniform:LOW:HIGH or lognormal:MU:SIGMA:LOW:HIGH")
    if low > high:
        raise LoadError(f"{option} has {text!r}: the lowest length {low} is above the highest, {high}")
    return found


def span(text: str, option: str) -> tuple[float, float]:
    """Read seconds, as `2` or as `0.1:2`."""
    first, colon, last = text.partition(":")
    low = number(first, option)
    high = number(last, option) if colon else low
    if low > high:
        raise LoadError(f"{option} has {text!r}: the first number is above the second")
    return low, high


def share(value: float, option: str) -> float:
    if not 0 <= value <= 1:
        raise LoadError(f"{option} is {value:g}: a share is between 0 and 1")
    return value


def slo(text: str) -> Slo:
    """Read `ttft=500,gap=50`: milliseconds by figure."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if name not in SLO_FIGURES or not equals:
            raise LoadError(f"--slo has {part.strip()!r}: write FIGURE=MILLISECONDS with a figure of {', '.join(SLO_FIGURES)}")
        if name in limits:
            raise LoadError(f"--slo {text!r} names {name} twice")
        limits[name] = number(value, "--slo", above=True)
    return Slo(",".join(f"{name}={value:g}" for name, value in limits.items()), tuple(limits.items()))
