"""Says what a load is: its target, its shape and its lengths. The processes that send the load get it as one message."""

from __future__ import annotations

import itertools
from typing import Literal, get_args

import msgspec

from engine.slo import SloName

Route = Literal["generate", "completions", "chat", "grpc"]
ROUTES: tuple[Route, ...] = get_args(Route)


class LoadError(Exception):
    """Bad input or a target that cannot be used. The text says what was wrong, where, and what would be right."""


class Target(msgspec.Struct, frozen=True):
    """An endpoint. The prober fills in what the endpoint says about itself."""

    url: str  # http://HOST:PORT, or HOST:PORT for gRPC
    route: Route
    model: str = ""
    api_key: str | None = None
    vocab: int = 0  # prompts have token ids from 10 to vocab - 1; 0: the prober chooses
    as_text: bool = False  # prompts are text, not token ids
    tokens_per_word: float = 1.0  # of the endpoint's tokenizer, for prompts of text
    template_tokens: float = 0.0  # tokens that the chat template and special tokens add to a prompt of text
    context: int | None = None  # most tokens of prompt and output, if the endpoint says so
    is_tidegate: bool = False


class Lengths(msgspec.Struct, frozen=True):
    """A distribution of lengths in tokens. `a` and `b` are mean and sigma of the logarithm for `lognormal`, and else not used."""

    kind: Literal["fixed", "uniform", "lognormal"]
    low: int
    high: int
    a: float = 0.0
    b: float = 0.0

    @property
    def middle(self) -> float:
        """Return the mean without the bounds' effect on a lognormal, for estimates."""
        return min(self.high, 2.718281828 ** (self.a + self.b**2 / 2)) if self.kind == "lognormal" else (self.low + self.high) / 2


# The bounds and parameters are those of the project's outside yardstick, so that figures compare.
SHAPES: dict[str, tuple[Lengths, Lengths]] = {
    "chat": (Lengths("lognormal", 16, 4000, 6.0, 0.8), Lengths("lognormal", 8, 1024, 5.3, 0.7)),
    "rag": (Lengths("lognormal", 1000, 12000, 8.2, 0.4), Lengths("lognormal", 16, 512, 5.0, 0.5)),
    "long": (Lengths("lognormal", 8000, 32000, 9.9, 0.3), Lengths("lognormal", 32, 400, 5.0, 0.4)),
}


class Step(msgspec.Struct, frozen=True):
    """A time with one rate of arrivals, or with one that moves evenly from `rate` to `end_rate`. Requests per second."""

    rate: float
    end_rate: float
    seconds: float

    @property
    def label(self) -> str:
        return f"{self.rate:g}/s" if self.rate == self.end_rate else f"{self.rate:g} to {self.end_rate:g}/s"


class TraceRow(msgspec.Struct, frozen=True):
    """One request of a trace."""

    at: float  # seconds from the start
    prompt_tokens: int
    output_tokens: int
    slo_class: SloName | None = None


class Sessions(msgspec.Struct, frozen=True):
    """Agents: each sends turn after turn, and every prompt holds all turns before it."""

    num: int  # sessions at a time
    turns: int
    context: int  # tokens that the prompt and the answer of the last turn reach, and do not exceed
    think_s: float  # mean seconds between an answer and the next turn
    fork: float  # probability that a turn starts a second session that shares the context so far
    fork_turns: int  # most turns of such a session


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement. Exactly one of `steps`, `trace`, `concurrency` and `sessions` is given."""

    number: int = 0  # of the measurement in its run: each has prompts of its own
    seed: int
    steps: tuple[Step, ...] = ()
    burstiness: float = 1.0  # shape of the gamma distribution of the intervals: 1 is Poisson, less is burstier
    trace: tuple[TraceRow, ...] = ()
    concurrency: int = 0
    sessions: Sessions | None = None
    seconds: float = 60.0  # of the closed loop and of sessions
    requests: int | None = None  # most requests (of sessions: most sessions)
    warm_up: float = 0.0  # seconds of load before the measurement
    prompt: Lengths
    output: Lengths
    pairs: tuple[tuple[int, int], ...] = ()  # lengths of prompt and output to choose from, instead of the distributions
    prefix: int = 0  # tokens that prompts share, before their own
    prefixes: int = 1  # number of different shared prefixes
    cancel: float = 0.0  # share of the requests that the client cancels
    cancel_after: tuple[float, float] = (0.1, 2.0)  # seconds from, to
    slow: float = 0.0  # share of the requests whose client reads slowly
    slow_bytes: float = 200.0  # bytes per second that such a client reads
    slo_class: SloName | None = None
    deadline_ms: int | None = None
    temperature: float = 0.7
    ignore_eos: bool = True
    timeout: float = 180.0

    @property
    def kind(self) -> Literal["open", "trace", "closed", "sessions"]:
        return "open" if self.steps else "trace" if self.trace else "closed" if self.concurrency else "sessions"

    @property
    def measured_seconds(self) -> float:
        """Return the length of the measured window: arrivals of the window count, however long they take."""
        if self.steps:
            return sum(step.seconds for step in self.steps)
        return self.trace[-1].at - self.warm_up if self.trace else self.seconds

    @property
    def name(self) -> str:
        """Return the name of the workload, for people."""
        if self.steps:
            return f"open {_path_of(self.steps)}"
        if self.sessions:
            return f"sessions {self.sessions.num} of {self.sessions.turns} turns to {self.sessions.context} tokens"
        return f"trace of {len(self.trace)}" if self.trace else f"closed {self.concurrency}"


def _path_of(steps: tuple[Step, ...]) -> str:
    """Return where the rate goes: `10/s`, or `10 to 80 to 10/s in 15 steps`."""
    if len(steps) == 1:
        return steps[0].label
    rates = [rate for step in steps for rate in (step.rate, step.end_rate)]
    moves = [b - a for a, b in itertools.pairwise(rates) if a != b]
    path = [rate for i, rate in enumerate(rates) if i == 0 or rate != rates[i - 1]]
    turns = [path[i + 1] for i, (a, b) in enumerate(itertools.pairwise(moves)) if (a > 0) != (b > 0)]
    return f"{' to '.join(f'{rate:g}' for rate in (path[0], *turns, path[-1]))}/s in {len(steps)} steps"
