"""Defines loads for simulations: when requests arrive, how long their prompts and outputs are, and whose they are.

Arrivals are open loop: no request waits for the answer of another. With the same seed, `poisson` gives the arrivals, lengths and
token ids of the project's benchmark of a served model, so that a simulation and a real run have the same requests.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from engine.errors import ConfigError
from engine.slo import DEFAULT_SLO, SloName

LOWEST_TOKEN, HIGHEST_TOKEN = 10, 10_000  # range of the random token ids of prompts
SEED = 7


class Lengths(NamedTuple):
    """A log-normal distribution of numbers of tokens, cut off at both ends."""

    mu: float
    sigma: float
    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        return int(min(self.high, max(self.low, rng.lognormvariate(self.mu, self.sigma))))


class LoadShape(NamedTuple):
    prompt: Lengths
    outputs: Lengths


SHAPES = {
    "chat": LoadShape(Lengths(6.0, 0.8, 16, 4000), Lengths(5.3, 0.7, 8, 1024)),
    "rag": LoadShape(Lengths(8.2, 0.4, 1000, 12_000), Lengths(5.0, 0.5, 16, 512)),
    "long": LoadShape(Lengths(9.9, 0.3, 8000, 32_000), Lengths(5.0, 0.4, 32, 400)),
}


class Client(NamedTuple):
    """What all requests of one client ask for."""

    tenant: str = ""
    slo: SloName = DEFAULT_SLO
    promised: bool = False
    deadline_s: float | None = None


ANYONE = Client()


class Arrival(NamedTuple):
    at: float  # seconds since the begin of the load
    prompt: array[int]  # token ids
    num_outputs: int
    client: Client = ANYONE


def shape_of(name: str) -> LoadShape:
    """Return the shape `name`. Raises ConfigError for an unknown one."""
    if name not in SHAPES:
        raise ConfigError(f"shape is {name!r}: it must be one of {', '.join(SHAPES)}", param="shape")
    return SHAPES[name]


def poisson(
    rate: float, seconds: float, shape: LoadShape, client: Client = ANYONE, *, prefix: int = 0, seed: int = SEED
) -> list[Arrival]:
    """Return Poisson arrivals of `rate` requests a second. All prompts begin with the same `prefix` tokens."""
    rng = random.Random(seed)
    return _draw(rng, lambda: rng.expovariate(rate), seconds, shape, client, prefix)


def bursts(
    rate: float, seconds: float, shape: LoadShape, client: Client = ANYONE, *, cv: float, prefix: int = 0, seed: int = SEED
) -> list[Arrival]:
    """Return arrivals whose distances follow a gamma distribution with the coefficient of variation `cv`. 1 is Poisson."""
    rng, order = random.Random(seed), 1 / cv**2
    return _draw(rng, lambda: rng.gammavariate(order, 1 / (rate * order)), seconds, shape, client, prefix)


def steps(phases: Iterable[tuple[float, float]], shape: LoadShape, client: Client = ANYONE, *, seed: int = SEED) -> list[Arrival]:
    """Return Poisson arrivals whose rate changes. A phase is a rate in requests a second, and its duration in seconds."""
    found: list[Arrival] = []
    begin = 0.0
    for number, (rate, seconds) in enumerate(phases):
        found += [a._replace(at=begin + a.at) for a in poisson(rate, seconds, shape, client, seed=seed + number)]
        begin += seconds
    return found


def merge(*loads: Iterable[Arrival]) -> list[Arrival]:
    """Return the arrivals of all `loads` in the order of time."""
    return sorted((arrival for load in loads for arrival in load), key=lambda arrival: arrival.at)


def _draw(
    rng: random.Random, distance: Callable[[], float], seconds: float, shape: LoadShape, client: Client, prefix: int
) -> list[Arrival]:
    shared, found, now = random_tokens(rng, prefix), [], 0.0
    while (now := now + distance()) < seconds:
        num_prompt, num_outputs = shape.prompt.draw(rng), shape.outputs.draw(rng)
        found.append(Arrival(now, shared + random_tokens(rng, num_prompt), num_outputs, client))
    return found


def random_tokens(rng: random.Random, num: int) -> array[int]:
    """Return `num` token ids as `rng.randint(LOWEST_TOKEN, HIGHEST_TOKEN)` gives them, at a third of its time."""
    size, draw, found = HIGHEST_TOKEN - LOWEST_TOKEN + 1, rng.getrandbits, array("i")
    bits = size.bit_length()
    while len(found) < num:
        token = draw(bits)
        if token < size:
            found.append(LOWEST_TOKEN + token)
    return found


class _TraceLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a trace: a request's arrival in seconds, its lengths in tokens, and, if given, what it asks for."""

    at: float
    prompt: int
    outputs: int
    tenant: str = ""
    slo: SloName | None = None
    deadline_s: float | None = None


def read_trace(path: str | Path, *, seed: int = SEED) -> list[Arrival]:
    """Read a file with one JSON object a line. A request that names a class is promised it. Prompts are random token ids.

    Raises ConfigError, naming the line and what is wrong with it.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"trace is {str(path)!r}, which cannot be read: {error.strerror}", param="trace") from None
    rng = random.Random(seed)
    found: list[Arrival] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            asked = _trace_line(line, f"trace {str(path)!r}, line {number}", found)
            client = Client(asked.tenant, asked.slo or DEFAULT_SLO, asked.slo is not None, asked.deadline_s)
            found.append(Arrival(asked.at, random_tokens(rng, asked.prompt), asked.outputs, client))
    if not found:
        raise ConfigError(f"trace {str(path)!r} has no requests", param="trace")
    return found


def _trace_line(line: bytes, where: str, before: Sequence[Arrival]) -> _TraceLine:
    try:
        asked = msgspec.json.decode(line, type=_TraceLine)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{where}: {error}", param="trace") from None
    earliest = before[-1].at if before else 0.0
    if not (math.isfinite(asked.at) and asked.at >= earliest):
        raise ConfigError(
            f"{where}: at is {asked.at}, and must be at least {earliest}: lines are in order of time", param="trace"
        )
    for name in ("prompt", "outputs"):
        if getattr(asked, name) < 1:
            raise ConfigError(f"{where}: {name} is {getattr(asked, name)}: it must be at least 1 token", param="trace")
    if asked.deadline_s is not None and not (math.isfinite(asked.deadline_s) and asked.deadline_s > 0):
        raise ConfigError(f"{where}: deadline_s is {asked.deadline_s}: it must be more than 0", param="trace")
    return asked
