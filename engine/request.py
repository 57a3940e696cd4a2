"""A request from admission to its last token: what was asked (SamplingParams), how far it is (Request), what it
says (TokenEvent).

`Request` is the only mutable type here and belongs to the scheduler. The others are frozen and cross processes as msgpack.
"""

from __future__ import annotations

import enum
import math
from array import array
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from engine.errors import InvalidRequest


class Bound(NamedTuple):
    """Closed range of a number, and what the API says of it: the request schemas are made from this table."""

    low: float
    high: float
    about: str = ""


SEED_MAX = 2**63 - 1
MAX_STOP_IDS = 256
MAX_LOGIT_BIAS = 1024
BOUNDS: dict[str, Bound] = {
    "max_tokens": Bound(1, 2**31 - 1),
    "min_tokens": Bound(0, 2**31 - 1, "No end before this many tokens."),
    "temperature": Bound(0.0, 100.0, "0 takes the likeliest token each time."),
    "top_p": Bound(0.0, 1.0, "Sample from the likeliest tokens that make up this probability."),
    "top_k": Bound(0, 2**31 - 1, "Sample from this many likeliest tokens; 0 for all."),
    "min_p": Bound(0.0, 1.0, "Drop tokens below this share of the likeliest one's probability."),
    "presence_penalty": Bound(-2.0, 2.0, "Against tokens already generated."),
    "frequency_penalty": Bound(-2.0, 2.0, "The same, times how often."),
    "repetition_penalty": Bound(0.01, 100.0, "Over prompt and output; 1 for none."),
    "seed": Bound(0, SEED_MAX, "The same seed and request give the same tokens."),
    "logprobs": Bound(0, 20),
    "prompt_logprobs": Bound(0, 20, "Alternatives to report at each prompt token, once a prompt."),
    "logit_bias": Bound(-100.0, 100.0),
    "priority": Bound(-1000, 1000),
}


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How to choose and when to stop. Raises InvalidRequest, naming the field, for a value out of `BOUNDS`.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 mean "no limit". `logprobs` is the number of alternatives to
    report beside the chosen token (0: the chosen one alone; None: none at all).
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0  # over the tokens generated so far
    frequency_penalty: float = 0.0  # likewise, times how often
    repetition_penalty: float = 1.0  # over prompt and output
    seed: int | None = None
    logit_bias: dict[int, float] | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, bound in BOUNDS.items():
            if name in _SCALARS:
                _check(name, getattr(self, name), bound)
        for token, bias in (self.logit_bias or {}).items():
            _check(f"logit_bias[{token}]", bias, BOUNDS["logit_bias"])
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest(f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}", param="min_tokens")
        if len(self.stop_token_ids) > MAX_STOP_IDS:
            raise InvalidRequest(f"stop_token_ids has more than {MAX_STOP_IDS} entries", param="stop_token_ids")
        if len(self.logit_bias or ()) > MAX_LOGIT_BIAS:
            raise InvalidRequest(f"logit_bias has more than {MAX_LOGIT_BIAS} entries", param="logit_bias")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


_SCALARS = frozenset(SamplingParams.__struct_fields__) & frozenset(BOUNDS) - {"logit_bias"}


def _check(name: str, value: float | None, bound: Bound) -> None:
    if value is None:
        return
    if not math.isfinite(value) or not bound.low <= value <= bound.high:
        raise InvalidRequest(f"{name} is {value}: it must lie between {bound.low} and {bound.high}", param=name.partition("[")[0])


class Status(enum.Enum):
    WAITING = "waiting"  # in the queue; holds no blocks
    RUNNING = "running"  # owns a batch row and blocks
    FINISHED = "finished"  # its terminal event is out; holds nothing


class FinishReason(enum.StrEnum):
    STOP = "stop"  # end-of-sequence, a stop token, or a stop string
    LENGTH = "length"  # max_tokens or the model's context
    ABORT = "abort"
    ERROR = "error"


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probabilities at one position: of the token that stands there, and of the `top` likeliest, best first."""

    token: int
    logprob: float
    rank: int  # 1 is the likeliest
    top_ids: list[int]
    top_logprobs: list[float]


class RequestFailure(msgspec.Struct, frozen=True, array_like=True):
    """A request's error as it crosses processes: the class name in `engine.errors`, and its message."""

    error: str
    message: str
    param: str | None = None


class TokenEvent(msgspec.Struct, array_like=True, gc=False, omit_defaults=True):
    """What one step says of one request. The last one of each request, and only it, has `finish`."""

    request_id: str
    tokens: list[int]
    finish: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None  # one for each of `tokens`, where asked for
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # with the first token; None stands for position 0
    num_cached: int | None = None  # prompt tokens found in the prefix cache; with the first token
    queue_s: float | None = None  # seconds from arrival to first being scheduled; with the first token
    stop_token: int | None = None  # the token that ended it, where one did (it is the last of `tokens`)
    failure: RequestFailure | None = None  # with finish ERROR


class Request:
    """One prompt from admission to its last token.

        tokens      [ prompt ............ | outputs ...... ]
        num_prompt  ^-------------------^
        num_computed: KV is in the cache, or will be once the submitted steps have run
        num_uncommitted:  to be sampled by submitted steps whose results are not committed yet (0 to 2)
        num_tokens  = len(tokens) + num_uncommitted;  the work left is num_tokens - num_computed

    Times are in seconds of the engine's monotonic clock. A smaller `priority` runs first.
    """

    __slots__ = (
        "arrival",
        "blocks",
        "end_len",
        "fork_of",
        "num_cached",
        "num_computed",
        "num_prompt",
        "num_uncommitted",
        "params",
        "priority",
        "prompt_logprobs",
        "request_id",
        "row",
        "salt",
        "scheduled_at",
        "seed",
        "sequence",
        "skips",
        "status",
        "stop_ids",
        "tokens",
    )

    def __init__(
        self,
        request_id: str,
        tokens: Iterable[int],
        params: SamplingParams,
        *,
        num_prompt: int,
        seed: int,
        eos_token_ids: tuple[int, ...] = (),
        max_model_len: int,
        priority: int = 0,
        arrival: float = 0.0,
        fork_of: str | None = None,
        salt: str = "",
    ) -> None:
        """`tokens` may reach past `num_prompt`: outputs of an earlier life, which count towards max_tokens."""
        self.request_id = request_id
        self.tokens = array("i", tokens)  # an array is small, and the garbage collector does not visit its elements
        self.num_prompt = num_prompt
        self.params = params
        self.seed = seed
        self.priority = priority
        self.arrival = arrival
        self.fork_of = fork_of
        self.salt = salt  # requests share cached blocks only within one salt
        eos = () if params.ignore_eos else eos_token_ids
        self.stop_ids = frozenset(params.stop_token_ids).union(eos)
        self.end_len = min(num_prompt + params.max_tokens, max_model_len)  # len(tokens) at which it ends
        self.status = Status.WAITING
        self.num_computed = 0
        self.num_uncommitted = 0
        self.num_cached = 0
        self.row: int | None = None
        self.blocks: list[int] = []
        self.sequence = 0  # order of arrival, given by the queue
        self.skips = 0
        self.scheduled_at: float | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None  # collected chunk by chunk

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) + self.num_uncommitted

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.num_prompt

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status.value}, row={self.row}, "
            f"computed {self.num_computed} of {self.num_tokens}, prompt {self.num_prompt})"
        )
