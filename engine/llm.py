"""LLM: an engine in this process, for Python users, benchmarks and tests.

    llm = LLM("checkpoints/tidepool", cache={"num_blocks": 256})
    for completion in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
        print(completion.text)

An LLM serves one call at a time, because the engine's loop runs inside the caller's `generate`. The server adds chat
templates, stop strings, the sampling defaults of generation_config.json, and the end tokens of the tokenizer and its template.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
from tokenizers import Tokenizer

from engine.config import EngineConfig
from engine.core import build_core
from engine.errors import CheckpointError, ConfigError, InvalidRequest, Overloaded, error_from_name
from engine.messages import EngineInfo, EngineStats, Submit, check_submit, pack_tokens
from engine.request import SEED_MAX, CachedTokens, FinishReason, SamplingParams, TokenEvent, TokenLogprobs, output_seed

Prompt = str | list[int]


class Completion(msgspec.Struct, kw_only=True):
    """The result of one prompt. `text` is None if the prompt was given as token ids."""

    prompt_token_ids: list[int]
    token_ids: list[int] = []
    text: str | None = None
    finish_reason: FinishReason | None = None
    cached: CachedTokens = CachedTokens()  # prompt tokens found in the cache, by tier
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # one for each prompt token; None for the first token

    def add(self, event: TokenEvent) -> None:
        self.token_ids += event.tokens
        self.finish_reason = event.finish
        self.cached = event.cached or self.cached
        if event.logprobs is not None:
            self.logprobs = (self.logprobs or []) + event.logprobs
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs


class LLM:
    """`options` are the fields of EngineConfig; `cache`, `scheduler` and `fake` may be given as dicts.

    An LLM is a context manager; otherwise call `close`. `offline` is on by default, since the time until all completions are
    there matters more than the time of a single token.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        try:
            config = msgspec.convert({"model": str(model), "offline": True, **options}, EngineConfig)
        except msgspec.ValidationError as error:
            raise ConfigError(f"engine options: {error}") from None
        self._folder = Path(model)
        self._core = build_core(config)
        self._tokenizer: Tokenizer | None = None
        self._num_requests = 0

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Callable[[int, TokenEvent], None] | None = None,
    ) -> list[Completion]:
        """Return one completion for each prompt, in order. `progress` is called with each event and the index of its prompt.

        Raises InvalidRequest or ContextTooLong before anything runs, and NumericalError if the model computes NaN or infinity.
        After an exception, all requests of this call are aborted.
        """
        with_text = [isinstance(prompt, str) for prompt in prompts]
        completions = [Completion(prompt_token_ids=self._encode(prompt)) for prompt in prompts]
        with closing(self._run([c.prompt_token_ids for c in completions], _one_each(params, len(prompts)))) as events:
            for index, event in events:
                completions[index].add(event)
                if progress is not None:
                    progress(index, event)
        for completion, wanted in zip(completions, with_text, strict=True):
            if wanted:
                completion.text = self.tokenizer.decode(completion.token_ids)
        return completions

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[TokenEvent]:
        """Yield the events of one prompt as they arrive. Leaving the loop early aborts the request."""
        with closing(self._run([self._encode(prompt)], _one_each(params, 1))) as events:
            for _, event in events:
                yield event

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the model's folder, read on first use. Raises CheckpointError if there is none."""
        if self._tokenizer is None:
            path = self._folder / "tokenizer.json"
            if not path.is_file():
                raise CheckpointError(f"{path}: no such file; without a tokenizer, prompts must be token ids", param="prompt")
            self._tokenizer = Tokenizer.from_file(str(path))
        return self._tokenizer

    @property
    def info(self) -> EngineInfo:
        return self._core.info()

    def stats(self) -> EngineStats:
        return self._core.stats()

    def close(self) -> None:
        self._core.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        ids: list[int] = self.tokenizer.encode(prompt).ids
        return ids

    def _run(self, prompts: list[list[int]], params: list[SamplingParams]) -> Generator[tuple[int, TokenEvent], None, None]:
        """Submit all prompts and step until each has ended. If the iteration stops early, unfinished requests are aborted."""
        waiting = deque(enumerate(map(self._submission, prompts, params)))
        for _, submit in waiting:
            check_submit(submit, self._core.info().limits)
        running: dict[str, int] = {}
        try:
            while waiting or running:
                self._submit(waiting, running)
                for event in self._core.step():
                    index = running[event.request_id]
                    if event.finish is not None:
                        del running[event.request_id]
                    if event.failure is not None:
                        raise error_from_name(event.failure.error, event.failure.message, event.failure.param)
                    yield index, event
        finally:
            self._drop(list(running))

    def _submission(self, prompt: list[int], params: SamplingParams) -> Submit:
        self._num_requests += 1
        seed = output_seed(secrets.randbelow(SEED_MAX) if params.seed is None else params.seed, 0)
        return Submit(request_id=f"llm-{self._num_requests}", prompt=pack_tokens(prompt), params=params, seed=seed)

    def _submit(self, waiting: deque[tuple[int, Submit]], running: dict[str, int]) -> None:
        """Submit as many requests as the engine's queue accepts now."""
        while waiting:
            index, submit = waiting[0]
            try:
                self._core.submit(submit)
            except Overloaded:
                return
            waiting.popleft()
            running[submit.request_id] = index

    def _drop(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._core.abort(request_id)
        while request_ids and self._core.has_work:
            self._core.step()


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, num: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num
    if len(params) != num:
        raise InvalidRequest(
            f"params has {len(params)} entries for {num} prompts: give one for each, or one for all", param="params"
        )
    return list(params)
