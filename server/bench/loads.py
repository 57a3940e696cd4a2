"""Defines loads for simulations: when requests arrive, how long their prompts and outputs are, and whose they are.

Arrivals are open loop: no request waits for the answer of another. With the same seed, `poisson` gives the arrivals, lengths and
token ids of the project's benchmark of a served model, so that a simulation and a real run have the same requests.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, NamedTuple

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


Tokens = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]


class _TraceLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a trace: a request's arrival in seconds, its lengths in tokens, and, if given, what it asks for.

    The first four keys are those of the traces of `python -m loadtest run`.
    """

    at: Annotated[float, msgspec.Meta(ge=0)]
    prompt_tokens: Tokens
    output_tokens: Tokens
    slo_class: SloName | None = None
    tenant: str = ""
    deadline_s: Annotated[float, msgspec.Meta(gt=0)] | None = None


def read_trace(path: str | Path, *, seed: int = SEED) -> list[Arrival]:
    """Read a file with one JSON object a line. A request that names a class is promised it. Prompts are random token ids.

    Raises ConfigError, naming the line and what is wrong with it.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"trace is {str(path)!r}, which cannot be read: {error.strerror}", param="trace") from None
    rng, decoder = random.Random(seed), msgspec.json.Decoder(_TraceLine)
    found: list[Arrival] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            asked = decoder.decode(line)
        except msgspec.DecodeError as error:
            keys = ", ".join(_TraceLine.__struct_fields__)
            where = f"trace {str(path)!r}, line {number}"
            raise ConfigError(f"{where}: {error}; a line is a JSON object with {keys}", param="trace") from None
        client = Client(asked.tenant, asked.slo_class or DEFAULT_SLO, asked.slo_class is not None, asked.deadline_s)
        found.append(Arrival(asked.at, random_tokens(rng, asked.prompt_tokens), asked.output_tokens, client))
    if not found:
        raise ConfigError(f"trace {str(path)!r} has no requests: it needs one JSON object a line", param="trace")
    return merge(found)
