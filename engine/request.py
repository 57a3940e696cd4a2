"""The types of one generation request: its parameters (SamplingParams), its progress (Request), its output (TokenEvent).

Request is mutable and belongs to the scheduler. The other types cross processes as msgpack.
"""

from __future__ import annotations

import enum
import math
from array import array
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import msgspec
import xxhash

from engine.errors import InvalidRequest, Overloaded, TidegateError
from engine.slo import DEFAULT_SLO, SLO_CLASSES, SloName


class Bound(NamedTuple):
    """Describes one numeric request field: its closed range and its API description. The request schemas are built from these."""

    low: float
    high: float
    about: str = ""


NO_TOKEN = -1  # in place of a sampled token: the row's logits held NaN or infinity, so no token was sampled
NO_CHOICE = -2  # in place of a sampled token: the request's own restrictions exclude every token
SEED_MIN, SEED_MAX = -(2**63), 2**63 - 1  # a client's seed; the engine's seed is this number modulo 2^64
ENGINE_SEED_MAX = 2**64 - 1
MAX_STOP_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_ALLOWED_IDS = 1 << 16
MAX_BAD_WORDS = 1024  # token sequences; one bad word of a client may be several
MAX_BAD_WORD_TOKENS = 64
BOUNDS: dict[str, Bound] = {
    "max_tokens": Bound(0, 2**31 - 1),
    "min_tokens": Bound(0, 2**31 - 1, "The output cannot end before it has this many tokens."),
    "temperature": Bound(0.0, 100.0, "0 always selects the most probable token."),
    "top_p": Bound(0.0, 1.0, "Sample from the most probable tokens whose probabilities add up to this value."),
    "top_k": Bound(-1, 2**31 - 1, "Sample from this many of the most probable tokens; 0 or -1 for all tokens."),
    "min_p": Bound(0.0, 1.0, "Exclude tokens less probable than this fraction of the most probable token's probability."),
    "presence_penalty": Bound(-2.0, 2.0, "Subtracted from the logit of each token that was already generated."),
    "frequency_penalty": Bound(-2.0, 2.0, "Subtracted from the logit of each generated token once for each time it occurred."),
    "repetition_penalty": Bound(0.01, 100.0, "Lowers tokens of the prompt and output if above 1; 1 changes nothing."),
    "seed": Bound(SEED_MIN, SEED_MAX, "The same seed and request give the same tokens. Each of n outputs has its own."),
    "logprobs": Bound(0, 20),
    "prompt_logprobs": Bound(0, 20, "Number of most probable tokens to report at each prompt position."),
    "logit_bias": Bound(-100.0, 100.0),
    "priority": Bound(-1000, 1000),
}


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How to sample tokens and when to stop. Raises InvalidRequest, naming the field, for a value outside `BOUNDS`.

    `temperature` 0 selects the argmax. `top_k` 0 or -1 and `top_p` 1 mean "no limit". `logprobs` is the number of most probable
    tokens to report beside the sampled token: 0 reports the sampled token only, None reports nothing. `max_tokens` 0 computes
    the prompt and generates nothing.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0  # applies once to each token generated so far
    frequency_penalty: float = 0.0  # applies to each generated token once per occurrence
    repetition_penalty: float = 1.0  # applies to tokens of the prompt and the output
    seed: int | None = None
    logit_bias: dict[int, float] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of tokens that the output must not contain
    allowed_token_ids: tuple[int, ...] | None = None  # if not None, the output has only these tokens
    stop_token_ids: tuple[int, ...] = ()
    end_token_ids: tuple[int, ...] = ()  # the server's own additions to the checkpoint's end-of-sequence tokens
    ignore_eos: bool = False  # covers `end_token_ids` too
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
        if self.is_restricted:
            _check_restrictions(self)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @property
    def is_restricted(self) -> bool:
        """Whether the request itself excludes tokens. It may then exclude all of them."""
        return bool(self.bad_words) or self.allowed_token_ids is not None or self.min_tokens > 0

    def end_ids(self, eos_token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tokens that end an output without being named by the client. `eos_token_ids` are the checkpoint's."""
        return () if self.ignore_eos else eos_token_ids + self.end_token_ids


def _check_restrictions(params: SamplingParams) -> None:
    if params.allowed_token_ids is not None and not 0 < len(params.allowed_token_ids) <= MAX_ALLOWED_IDS:
        raise InvalidRequest(
            f"allowed_token_ids has {len(params.allowed_token_ids)} entries: it must have between 1 and {MAX_ALLOWED_IDS}",
            param="allowed_token_ids",
        )
    if len(params.bad_words) > MAX_BAD_WORDS:
        raise InvalidRequest(
            f"bad_words come to {len(params.bad_words)} sequences of tokens: at most {MAX_BAD_WORDS} are allowed",
            param="bad_words",
        )
    for i, word in enumerate(params.bad_words):
        if not 0 < len(word) <= MAX_BAD_WORD_TOKENS:
            raise InvalidRequest(
                f"bad_words[{i}] has {len(word)} tokens: it must have between 1 and {MAX_BAD_WORD_TOKENS}", param="bad_words"
            )


def output_seed(seed: int, index: int) -> int:
    """Return the engine's seed of output `index` of a request with the client's `seed`: a number of 64 bits.

    Output 0 has the client's seed modulo 2^64. The seeds of the others are hashes, so that the outputs of requests with
    neighbouring seeds are independent.
    """
    unsigned = seed % (ENGINE_SEED_MAX + 1)
    return unsigned if index == 0 else xxhash.xxh3_64_intdigest(index.to_bytes(8, "little"), seed=unsigned)


_SCALARS = frozenset(SamplingParams.__struct_fields__) & frozenset(BOUNDS) - {"logit_bias"}


def _check(name: str, value: float | None, bound: Bound) -> None:
    if value is None:
        return
    if not math.isfinite(value) or not bound.low <= value <= bound.high:
        raise InvalidRequest(f"{name} is {value}: it must lie between {bound.low} and {bound.high}", param=name.partition("[")[0])


class Status(enum.Enum):
    WAITING = "waiting"  # in the queue; holds no blocks, or the blocks that were loaded for it
    LOADING = "loading"  # in the queue; blocks of its prefix are on their way from a lower tier
    RUNNING = "running"  # owns a batch row and blocks
    FINISHED = "finished"  # has ended for any reason; holds nothing


class FinishReason(enum.StrEnum):
    STOP = "stop"  # the end-of-sequence token, a stop token, or a stop string
    LENGTH = "length"  # max_tokens or the model's context length was reached
    ABORT = "abort"
    ERROR = "error"


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probabilities at one position: of the token at that position, and of the most probable tokens in descending order."""

    token: int
    logprob: float
    rank: int  # of `token` by probability; 1 is the most probable
    top_ids: list[int]
    top_logprobs: list[float]


class RequestFailure(msgspec.Struct, frozen=True, array_like=True):
    """A request's error in the form that crosses processes. `engine.errors.error_from_name` makes an exception of it."""

    error: str  # name of a class in engine.errors
    message: str
    param: str | None = None
    retry_after: int | None = None  # seconds after which to try again; set for Overloaded alone

    @staticmethod
    def of(error: TidegateError) -> RequestFailure:
        retry_after = error.retry_after if isinstance(error, Overloaded) else None
        return RequestFailure(type(error).__name__, error.message, error.param, retry_after)


class CachedTokens(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How many tokens of a prompt were found in the KV cache, by the tier that had them."""

    gpu: int = 0  # the memory of the device that computes, whatever it is
    host: int = 0  # loaded from host memory for this request
    disk: int = 0  # loaded from disk for this request

    @staticmethod
    def split(num: int, computed: int, host: int, disk: int) -> CachedTokens:
        """Return the tiers of the first `num` of `computed` tokens, of which `host` and `disk` were loaded from there.

        Those from the GPU come first. What lies behind `num` is taken to be from the disk before it is from the host.
        """
        gpu = min(num, computed - host - disk)
        host = min(num - gpu, host)
        return CachedTokens(gpu, host, num - gpu - host)

    @property
    def total(self) -> int:
        return self.gpu + self.host + self.disk

    def __add__(self, other: CachedTokens) -> CachedTokens:
        return CachedTokens(self.gpu + other.gpu, self.host + other.host, self.disk + other.disk)


class TokenEvent(msgspec.Struct, array_like=True, gc=False, omit_defaults=True):
    """What one step produced for one request. The last event of a request has `finish`, and no other event has it."""

    request_id: str
    tokens: list[int]
    finish: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None  # one for each of `tokens`, if requested
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # with the first token, if requested; None at position 0
    cached: CachedTokens | None = None  # with the first token: prompt tokens found in the cache at the first admission
    queue_s: float | None = None  # with the first token: seconds from arrival to the first admission
    stop_token: int | None = None  # the stop token that ended the request (also the last of `tokens`), if one did
    failure: RequestFailure | None = None  # set if and only if `finish` is ERROR


@lru_cache(maxsize=64)
def _stop_ids(stop_token_ids: tuple[int, ...], eos_token_ids: tuple[int, ...]) -> frozenset[int]:
    """Return the ids that end a request. Most requests share one set, which the garbage collector then visits once.

    NO_TOKEN and NO_CHOICE are among them, so that the scheduler tests each token once for all these cases.
    """
    return frozenset(stop_token_ids).union(eos_token_ids, (NO_TOKEN, NO_CHOICE))


class Request:
    """One prompt and its output, from acceptance to the last token.

        tokens           [ prompt ............ | outputs ...... ]
        num_prompt       ^-------------------^
        num_computed     tokens whose KV is in the cache once the submitted steps have run
        num_uncommitted  tokens sampled by submitted steps whose results are not committed yet (0 to 2)
        num_tokens       len(tokens) + num_uncommitted; num_tokens - num_computed is the work left

    Times are in seconds of the engine's monotonic clock. A smaller `priority` runs first. The scheduler's policy sets `rank`.
    """

    __slots__ = (
        "arrival",
        "awaited",
        "blocks",
        "cached",
        "deadline",
        "end_len",
        "expected_at",
        "fork_of",
        "leader",
        "num_computed",
        "num_from_disk",
        "num_loaded",
        "num_matched",
        "num_prompt",
        "num_queued",
        "num_uncommitted",
        "params",
        "priority",
        "promised",
        "prompt_logprobs",
        "rank",
        "request_id",
        "row",
        "salt",
        "scheduled_at",
        "seed",
        "sequence",
        "skips",
        "slo",
        "spills",
        "stalled",
        "status",
        "stop_ids",
        "tenant",
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
        tenant: str = "",
        slo: SloName = DEFAULT_SLO,
        promised: bool = False,
        deadline_s: float | None = None,
    ) -> None:
        """Create a waiting request. `tokens` is the prompt, followed by the outputs that an earlier engine generated for it.

        The first `num_prompt` tokens are the prompt. The outputs count towards max_tokens. `deadline_s` counts from `arrival`.
        """
        self.request_id = request_id
        self.tokens = array("i", tokens)  # an array is small, and the garbage collector does not visit its elements
        self.num_prompt = num_prompt
        self.params = params
        self.seed = seed
        self.priority = priority
        self.arrival = arrival
        self.fork_of = fork_of
        self.salt = salt  # requests share cached blocks only within one salt
        self.tenant = tenant
        self.slo = SLO_CLASSES[slo]
        self.promised = promised  # refuse the request if its first token is predicted to come later than its class promises
        self.deadline = None if deadline_s is None else arrival + deadline_s
        self.stop_ids = _stop_ids(params.stop_token_ids, params.end_ids(eos_token_ids))
        # The request ends when len(tokens) reaches this. With max_tokens 0 one token is sampled, and then dropped.
        self.end_len = min(num_prompt + max(1, params.max_tokens), max_model_len)
        self.status = Status.WAITING
        self.num_computed = 0
        self.num_uncommitted = 0
        self.cached = CachedTokens()  # prompt tokens found in the cache at the first admission
        self.num_loaded = 0  # tokens of its prefix that were loaded from the host for the latest admission
        self.num_from_disk = 0  # and from the disk
        self.num_matched = 0  # tokens found in the prefix cache when the request arrived, if that was looked up
        self.num_queued = 0  # number of tokens when the request came into the queue
        self.expected_at: float | None = None  # when its first token was predicted to come, if that was predicted
        self.row: int | None = None
        self.blocks: list[int] = []
        self.leader: Request | None = None  # the request named by `fork_of`, once both prompts were found equal
        self.sequence = 0  # order of arrival, assigned by the scheduler
        self.rank = (self.slo.rank, 0.0, 0)  # (level, due time, sequence); the smallest is the best
        self.skips = 0  # later requests that were admitted while this one did not fit
        self.awaited = 0  # highest num_computed seen of a request that computes the prefix which this request waits for
        self.stalled = 0  # steps in which this request waited for its prefix and `awaited` did not grow
        self.scheduled_at: float | None = None
        self.spills = False  # its tokens are more than the GPU's cache holds, so older blocks lie in the host tier while it runs
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None  # of the prompt chunks computed so far, if requested

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
