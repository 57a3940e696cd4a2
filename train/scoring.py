"""Scores held-out text: windows over each file's tokens, whose log-probabilities come from an engine or a server.

Each token is scored exactly once, the first of a file after <|begin|>. A file longer than a window is read in windows that
overlap by half, so that every token has at least half a window, or all of its file, before it.

    tokens    |b 1 2 3 4 5 6 7 8 9 a b c|
    window 0  |. x x x x x x x|                  x: scored, .: context only
    window 1          |. . . . x x x x|
    window 2                  |. . . . x|
"""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol, TypeVar
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import msgspec

from engine import LLM, SamplingParams
from engine.errors import ConfigError

_Answer = TypeVar("_Answer", bound=msgspec.Struct)

TIMEOUT_S = 600.0
CONCURRENT = 4  # concurrent requests to a server, so that it computes some while it serialises another


class Document(NamedTuple):
    path: str
    text: str


class Span(NamedTuple):
    """Describes one window of a file: tokens [start, end) go through the model, and the tokens from `scored` on are scored."""

    start: int
    end: int
    scored: int


class Position(NamedTuple):
    """Holds a model's score of one token: the token's log-probability in nats, and its rank (1 is the argmax)."""

    logprob: float
    rank: int


class Score(NamedTuple):
    """Holds sums over scored tokens: log-probabilities in nats, the number of tokens, and how many tokens are the argmax."""

    logprob: float
    tokens: int
    first: int

    def bits_per_byte(self, num_bytes: int) -> float:
        return -self.logprob / math.log(2) / num_bytes

    @property
    def top1(self) -> float:
        return self.first / self.tokens


class Scorer(Protocol):
    """Scores tokens with one model. `max_window` is the largest number of tokens in a prompt."""

    name: str
    max_window: int

    def encode(self, text: str) -> list[int]:
        """Tokenise a text, with the special tokens that the tokenizer puts before a prompt."""
        ...

    def positions(self, prompts: Sequence[list[int]], done: Callable[[int], None]) -> Iterator[list[Position]]:
        """Score the tokens of each prompt, in order, from the second token on.

        `done` is called with the number of tokens of each finished prompt.
        """
        ...


def read_documents(path: Path, max_bytes: int | None = None) -> list[Document]:
    """Read documents from xz-compressed JSON lines; `max_bytes` limits the text, and the last document is cut to fit.

    Raises ConfigError if the file is missing or has another form.
    """
    documents, left = [], max_bytes
    for document in _read(path):
        raw = document.text.encode()[:left]
        if left is not None:
            left -= len(raw)
        text = raw.decode(errors="ignore")  # drops a character that the limit cut in two
        if text:
            documents.append(Document(document.path, text))
        if left == 0:
            break
    if not documents:
        raise ConfigError(f"{path}: there is no text in it to score", param="heldout")
    return documents


def _read(path: Path) -> Iterator[Document]:
    try:
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                yield _document(line, f"{path}: line {number}")
    except (OSError, lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a whole xz file of UTF-8 text: {error}", param="heldout") from None


def _document(line: str, where: str) -> Document:
    try:
        record = json.loads(line)
        return Document(record["path"], record["text"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'{where} must be a JSON object with "path" and "text": {error!r}', param="heldout") from None


def windows(num_tokens: int, size: int) -> list[Span]:
    """Cover a file of `num_tokens` tokens with windows of at most `size` tokens. Each token but the first is scored once."""
    if size < 2:
        raise ConfigError(f"context is {size}: a window must have at least 2 tokens, one to predict from", param="context")
    if num_tokens < 2:
        return []
    spans = [Span(0, min(size, num_tokens), 1)]
    while (end := spans[-1].end) < num_tokens:
        start = end - size // 2
        spans.append(Span(start, min(start + size, num_tokens), end))
    return spans


def score(scorer: Scorer, files: Sequence[list[int]], size: int, done: Callable[[int], None] = lambda _: None) -> Score:
    """Score the tokens of each file in windows of at most `size` tokens. Returns the sums over all files."""
    spans = [(ids, span) for ids in files for span in windows(len(ids), size)]
    logprob, tokens, first = 0.0, 0, 0
    found = scorer.positions([ids[span.start : span.end] for ids, span in spans], done)
    for (_, span), positions in zip(spans, found, strict=True):
        mine = positions[span.scored - span.start - 1 :]
        logprob += math.fsum(p.logprob for p in mine)
        tokens += len(mine)
        first += sum(p.rank == 1 for p in mine)
    if not tokens:
        raise ConfigError("no file has a token to score", param="heldout")
    return Score(logprob, tokens, first)


def xz_size(raw: bytes) -> int:
    """Return the size in bytes of `raw` after compression by `xz -9e`."""
    return len(lzma.compress(raw, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME))


class EngineScorer:
    """Scores tokens with an engine in this process."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.name = llm.info.model
        self.max_window = llm.info.limits.max_model_len - 1  # a request generates at least one token

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._llm.tokenizer.encode(text).ids
        return ids

    def positions(self, prompts: Sequence[list[int]], done: Callable[[int], None]) -> Iterator[list[Position]]:
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        for completion in self._llm.generate(prompts, params, progress=lambda index, _: done(len(prompts[index]))):
            yield [Position(p.logprob, p.rank) for p in completion.prompt_logprobs or () if p is not None]


class ServerFailure(Exception):
    """Raised if a server cannot be reached, answers with an error, or does not answer as a Tidegate server does."""


class _Model(msgspec.Struct):
    id: str
    max_model_len: int


class _Models(msgspec.Struct):
    data: Annotated[list[_Model], msgspec.Meta(min_length=1)]


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Output(msgspec.Struct):
    prompt_logprobs: list[_Logprob | None]


class _Logprob(msgspec.Struct):
    logprob: float
    rank: int


class _Generated(msgspec.Struct):
    outputs: Annotated[list[_Output], msgspec.Meta(min_length=1)]


class ServerScorer:
    """Scores tokens with a Tidegate server, through POST /v1/generate and POST /tokenize."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        card = self._ask("/v1/models", _Models).data[0]
        self.name = card.id
        self.max_window = card.max_model_len - 1

    def encode(self, text: str) -> list[int]:
        return self._ask("/tokenize", _Tokens, {"prompt": text}).tokens

    def positions(self, prompts: Sequence[list[int]], done: Callable[[int], None]) -> Iterator[list[Position]]:
        with ThreadPoolExecutor(CONCURRENT) as pool:
            for prompt, positions in zip(prompts, pool.map(self._positions, prompts), strict=True):
                done(len(prompt))
                yield positions

    def _positions(self, prompt: list[int]) -> list[Position]:
        body = {"prompt_token_ids": prompt, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0, "cache": "off"}
        found = self._ask("/v1/generate", _Generated, body).outputs[0].prompt_logprobs
        return [Position(p.logprob, p.rank) for p in found if p is not None]

    def _ask(self, path: str, kind: type[_Answer], body: dict[str, Any] | None = None) -> _Answer:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self._url + path, data, {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=TIMEOUT_S) as answer:
                return msgspec.json.decode(answer.read(), type=kind)
        except HTTPError as error:
            with error:
                said = error.read(2000).decode(errors="replace")
            raise ServerFailure(f"{self._url}{path} answered {error.code}: {said}") from None
        except (URLError, OSError, HTTPException, msgspec.MsgspecError) as error:
            raise ServerFailure(f"{self._url}{path}: {error}; it must be the address of a Tidegate server") from None
