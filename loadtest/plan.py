"""Makes the requests of a load from its seed. Request i is the same, however many processes send the load and whenever."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from engine.slo import SloName
from loadtest.arrivals import arrivals
from loadtest.spec import Lengths, Load, LoadError, Step

# What a stream of random numbers is for. Streams are independent, so that one option does not change what another one draws.
ARRIVALS, REQUEST, CLIENT, PROMPT, PREFIX, SESSION = range(6)
WARM_UP = -1  # `step` of a request of the warm-up


class Order(NamedTuple):
    """One request as planned."""

    number: int
    at: float  # seconds from the start of the measured window; below 0 in the warm-up
    step: int  # number of the step in its load, or WARM_UP
    prompt_tokens: int  # without the shared prefix
    output_tokens: int
    slo_class: SloName | None
    prefix: int  # number of the shared prefix
    cancel_after: float | None  # seconds from sending
    slow: bool


class Turn(NamedTuple):
    """One turn of a session."""

    think_s: float  # wait before the turn
    new_tokens: int  # tokens that the turn adds to the context
    output_tokens: int
    fork: Session | None  # a session that starts with this turn, from the same context


class Session(NamedTuple):
    key: int  # its own number among all sessions and forks, the seed of its prompts
    turns: tuple[Turn, ...]


class Plan:
    def __init__(self, load: Load) -> None:
        self.load = load

    def rng(self, purpose: int, index: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.load.seed, self.load.number, purpose, index])

    def times(self) -> list[float]:
        """Return the times of all requests of an open loop or of a trace, from the start of the measured window. Raises LoadError
        if none is in the window."""
        load = self.load
        if load.trace:
            # A trace has no rate for a warm-up: its own first seconds are the warm-up.
            times = [row.at - load.warm_up for row in load.trace]
        else:
            first = load.steps[0].rate
            warm_up = [Step(first, first, load.warm_up)] if load.warm_up and first else []
            drawn = arrivals([*warm_up, *load.steps], load.burstiness, self.rng(ARRIVALS))
            times = (drawn - (load.warm_up if warm_up else 0.0)).tolist()
        times = times[: load.requests]
        if not times or times[-1] < 0:
            raise LoadError(f"{load.name}: no request arrives in {load.measured_seconds:g} s; raise the rate or the seconds")
        return times

    def timed(self, number: int, at: float) -> Order:
        """Return request `number` of an open loop or of a trace, which `times` has at the time `at`."""
        order = self.order(number, at, self._step_at(at))
        if not self.load.trace:
            return order
        row = self.load.trace[number]
        order = order._replace(prompt_tokens=row.prompt_tokens, output_tokens=row.output_tokens)
        return order._replace(slo_class=row.slo_class or self.load.slo_class)

    def open_loop(self) -> list[Order]:
        """Return all requests of an open loop or of a trace in order of time."""
        return [self.timed(number, at) for number, at in enumerate(self.times())]

    def _step_at(self, at: float) -> int:
        if at < 0:
            return WARM_UP
        for number, step in enumerate(self.load.steps):
            at -= step.seconds
            if at < 0:
                return number
        return max(len(self.load.steps) - 1, 0)

    def order(self, index: int, at: float, step: int) -> Order:
        """Return request `index`, due at the time `at`."""
        load, rng = self.load, self.rng(REQUEST, index)
        if load.pairs:
            prompt, output = load.pairs[rng.integers(len(load.pairs))]
        else:
            prompt, output = draw(load.prompt, rng), draw(load.output, rng)
        client = self.rng(CLIENT, index)
        cancelled, slow, prefix = client.random() < load.cancel, client.random() < load.slow, client.integers(load.prefixes)
        after = float(client.uniform(*load.cancel_after)) if cancelled else None
        return Order(index, at, step, prompt, output, load.slo_class, int(prefix), after, bool(slow))

    def session(self, index: int) -> Session:
        """Return session `index`. Forks have no forks of their own."""
        sessions = self.load.sessions
        assert sessions is not None
        keys = iter(range(index * (sessions.turns + 1), (index + 1) * (sessions.turns + 1)))
        key = next(keys)
        return Session(key, tuple(self._turns(self.rng(SESSION, index), sessions.turns, self.load.prefix, keys)))

    def _turns(self, rng: np.random.Generator, num: int, context: int, keys: Iterator[int] | None) -> Iterator[Turn]:
        """Yield at most `num` turns, as many as fit into the largest context after the first `context` tokens. `keys` numbers the
        forks; None: the session is itself a fork."""
        load, sessions = self.load, self.load.sessions
        assert sessions is not None
        for i in range(num):
            first = i == 0 and keys is not None
            # The first wait spreads the sessions, which would otherwise all start together.
            think = rng.uniform(0, sessions.think_s) if first else rng.exponential(sessions.think_s) if sessions.think_s else 0.0
            new = draw(load.prompt, rng) if first else max(1, round(growth(load) * rng.uniform(0.5, 1.5)))
            output = draw(load.output, rng)
            left = sessions.context - context - output
            if left < 1:
                return
            new = min(new, left)
            fork = None
            if keys is not None and 0 < i < num - 1 and rng.random() < sessions.fork:
                fork = Session(next(keys), tuple(self._turns(rng, min(sessions.fork_turns, num - i), context, None)))
            yield Turn(float(think), new, output, fork)
            context += new + output


def growth(load: Load) -> float:
    """Return the tokens that a turn adds on average, so that the last turn of a session reaches `context`. Raises LoadError."""
    sessions = load.sessions
    assert sessions is not None
    if sessions.turns == 1:
        return 0.0
    left = sessions.context - load.prefix - load.prompt.middle - sessions.turns * load.output.middle
    if left < sessions.turns - 1:
        raise LoadError(
            f"--context {sessions.context} is too small for {sessions.turns} turns: the first prompt has about "
            f"{load.prefix + load.prompt.middle:.0f} tokens and each answer about {load.output.middle:.0f}"
        )
    return left / (sessions.turns - 1)


def draw(lengths: Lengths, rng: np.random.Generator) -> int:
    if lengths.kind == "lognormal":
        return int(min(lengths.high, max(lengths.low, rng.lognormal(lengths.a, lengths.b))))
    return int(rng.integers(lengths.low, lengths.high, endpoint=True))


def longest(load: Load) -> int:
    """Return the most tokens that a request of the load may have, prompt and output together."""
    if load.trace:
        return load.prefix + max(row.prompt_tokens + row.output_tokens for row in load.trace)
    if load.pairs:
        return load.prefix + max(prompt + output for prompt, output in load.pairs)
    return load.sessions.context if load.sessions else load.prefix + load.prompt.high + load.output.high
