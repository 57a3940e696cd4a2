"""GenerateService: the path of every request, under HTTP and gRPC, streaming or not.

    validate -> tokenise -> Call.submit: a request for each output -> events -> OutputBuilder -> Chunks, then one Ending

A call can end in many ways: its generator is closed, its task is cancelled, its deadline passes, `abort` is called, an error
occurs. In every case one `finally` aborts at once what still runs for it in the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from functools import partial
from typing import Any

import msgspec

from engine.errors import Aborted, InternalError, InvalidRequest, TidegateError, UnsupportedField
from engine.messages import TierName, check_ids, prompt_too_long
from engine.models.generation import GenerationDefaults
from engine.request import SamplingParams
from engine.slo import DEFAULT_SLO
from server.engines.base import EngineClientProtocol, EngineHealth
from server.metrics.registry import Metrics
from server.service.call import Call
from server.service.checks import (
    ServiceSettings,
    check_logprobs,
    check_model,
    check_request,
    check_text,
)
from server.service.text_work import TextWork, TooManyTokens
from server.service.types import Chunk, Ending, GenerationRequest, Identity
from server.text.chat import ChatTemplate
from server.text.conversation import Conversation, strings_in
from server.text.tokenizer import PIECE_CHARS, Tokenizer

_CHECKED_IDS = 1 << 16  # token ids validated in one go: about 2 ms of the event loop


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    created: int  # when this worker started, in seconds since 1970
    owned_by: str
    max_model_len: int
    default_sampling_params: dict[str, int | float]  # what a request gets where it says nothing


class GenerateService:
    """The service of one API worker. Every error it raises is an exception of `engine.errors`."""

    def __init__(
        self,
        client: EngineClientProtocol,
        text: Tokenizer,
        settings: ServiceSettings,
        metrics: Metrics,
        *,
        defaults: GenerationDefaults | None = None,
        server_ready: Callable[[], bool] = lambda: True,
    ) -> None:
        """`defaults` are the sampling defaults of the model's author.

        `server_ready` returns whether all workers of the server have an engine. Until then, `health` reports "not ready".
        """
        self.defaults = defaults or GenerationDefaults()
        self._end_ids = tuple(text.end_tokens)
        self._client = client
        self._server_ready = server_ready
        self._text = text
        self._text_work = TextWork(text, settings.max_waiting_text_bytes)
        self._settings = settings
        self._metrics = metrics
        self._created = int(time.time())
        self.anonymous = Identity(slo=settings.slo_class, priority_ceiling=settings.priority_ceiling)  # of callers without a key
        self._calls: dict[str, Call] = {}

    @property
    def model_name(self) -> str:
        return self._settings.model_name

    @property
    def max_model_len(self) -> int:
        return self._client.info.limits.max_model_len

    @property
    def num_running(self) -> int:
        """The number of `generate` calls that have begun and not ended."""
        return len(self._calls)

    async def generate(
        self, request: GenerationRequest, identity: Identity | None = None, *, transport: str = "http"
    ) -> AsyncGenerator[Chunk | Ending, None]:
        """Yield chunks of all outputs as they come, then one Ending. Closing the generator aborts the request.

        `identity` bounds the request's priority, promises a latency to requests that name no class, and separates the prefix
        cache by a salt. None stands for a caller without a key.
        """
        identity = identity or self.anonymous
        meter = self._metrics.begin(transport, request.slo_class or identity.slo or DEFAULT_SLO)
        call = Call(request, identity, meter)
        try:
            check_request(request, identity, self._settings)
            self._enter(call)
            prompt = await self._prompt_of(call)
            request = call.request = await self._completed(request, prompt)
            check_logprobs(request.params, self._settings, prompt_tokens=len(prompt), outputs=request.n)
            call.submit(self._client, self._text, prompt)
            while call.unfinished:
                event = await call.next_event()
                if event is not None:
                    yield call.chunk_of(event)
            meter.finished(call.finish_reason)
            yield call.ending()
        except (GeneratorExit, asyncio.CancelledError):
            meter.aborted()
            raise
        except TidegateError as error:
            # A stream that the call itself aborted raises Aborted; the call knows the reason.
            reason = call.ended_by if isinstance(error, Aborted) and call.ended_by is not None else error
            _use_client_names(reason, request.client_names)
            if isinstance(reason, Aborted):
                meter.aborted()
            else:
                meter.failed(reason.code)
            if reason is error:
                raise
            raise reason from None
        except Exception:
            meter.failed(InternalError.code)
            raise
        finally:
            call.close()
            self._leave(call)

    async def reset_cache(self, tiers: Collection[TierName]) -> dict[TierName, int]:
        """Make all engines forget the blocks that `tiers` have of prefixes. Returns how many blocks each tier had.

        Raises EngineUnavailable, naming the engine, if one is not ready, is lost or does not answer.
        """
        return await self._client.reset_cache(tiers)

    def check_logprobs(self, params: SamplingParams, *, prompt_tokens: int, outputs: int) -> None:
        """Check that the answer to a client's call of several prompts does not hold too many log-probabilities.

        `generate` checks only its own prompt. Raises InvalidRequest.
        """
        check_logprobs(params, self._settings, prompt_tokens=prompt_tokens, outputs=outputs)

    def abort(self, request_id: str) -> bool:
        """Abort a call of this worker, whose generator then raises Aborted. Returns False if this worker has no such call."""
        call = self._calls.get(request_id)
        if call is None:
            return False
        call.end(Aborted("the request was aborted"))
        return True

    async def chat_tokens(
        self,
        conversation: Conversation,
        *,
        model: str | None = None,
        add_special_tokens: bool = False,
        as_prompt: bool = False,
        keep: int | None = None,
    ) -> list[int]:
        """Render `conversation` with the model's chat template, and return the token ids.

        The rendered text already contains special tokens; `add_special_tokens` adds those of a prompt too. Raises InvalidRequest
        or UnsupportedField, and with `as_prompt` ContextTooLong if the text is too long for a prompt. `keep` is the number of
        last tokens of a prompt to use; None for all.
        """
        check_model(model, self.model_name)
        template = self._text.chat.find(conversation.template, self.model_name)
        prompt = await self._text_work.render(partial(_render, template, conversation), conversation.weight(PIECE_CHARS))
        if as_prompt:
            return await self._prompt_ids(prompt, add_special_tokens=add_special_tokens, name="messages", keep=keep)
        return await self._text_work.encode(prompt, add_special_tokens=add_special_tokens)

    async def tokenize(
        self,
        text: str,
        *,
        model: str | None = None,
        add_special_tokens: bool = True,
        as_prompt: bool = False,
        keep: int | None = None,
    ) -> list[int]:
        """Return the token ids of `text`. With `as_prompt`, raises ContextTooLong if the text is too long for a prompt.

        `keep` is the number of last tokens of a prompt to use; None for all.
        """
        check_model(model, self.model_name)
        check_text(text, "prompt")
        if as_prompt:
            return await self._prompt_ids(text, add_special_tokens=add_special_tokens, name="prompt", keep=keep)
        return await self._text_work.encode(text, add_special_tokens=add_special_tokens)

    async def detokenize(self, token_ids: Sequence[int], *, model: str | None = None, skip_special_tokens: bool = False) -> str:
        """Return the text of `token_ids`, with the text of special tokens unless `skip_special_tokens` is True."""
        check_model(model, self.model_name)
        await self._check_ids(token_ids, "tokens")
        return await self._text_work.decode(token_ids, skip_special_tokens=skip_special_tokens)

    async def prompt_text(
        self, text: str | None, token_ids: Sequence[int], *, skip_special_tokens: bool
    ) -> tuple[str, list[int]]:
        """Return the text of a prompt, and where in it the text of each of `token_ids` begins.

        `text` is the prompt as the client sent it, of which `token_ids` are the tokens; None if the client sent token ids. Raises
        ContextTooLong if there are too many for a prompt.
        """
        if text is not None:
            return text, await self._text_work.offsets_in(text, token_ids)
        self._check_length(token_ids, "prompt")
        await self._check_ids(token_ids, "prompt")
        return await self._text_work.text_and_offsets(token_ids, skip_special_tokens=skip_special_tokens)

    def kept_of(self, truncate: int | None, max_tokens: int) -> int | None:
        """Return how many last tokens of a prompt to use, from the field truncate_prompt_tokens; None for all.

        -1 stands for as many as the context leaves beside `max_tokens`, or beside one token if `max_tokens` itself does not fit.
        """
        if truncate != -1:
            return truncate
        return self.max_model_len - (max_tokens if 0 < max_tokens < self.max_model_len else 1)

    def token_text(self, token: int) -> str:
        """Return the text of one token by itself, for answers with log-probabilities."""
        return self._text.token_text(token)

    def token_bytes(self, token: int) -> bytes:
        return self._text.token_bytes(token)

    def models(self) -> list[ModelInfo]:
        return [
            ModelInfo(
                id=self.model_name,
                created=self._created,
                owned_by="tidegate",
                max_model_len=self.max_model_len,
                default_sampling_params=self.defaults.params,
            )
        ]

    def health(self) -> EngineHealth:
        """Return the engine's health as this worker sees it.

        Until all workers of the server have an engine, the health is "not ready" and "not started".
        """
        health = self._client.health
        if self._server_ready() or not health.ready:
            return health
        return msgspec.structs.replace(health, ready=False, started=False, reason="another API worker is still starting")

    def _enter(self, call: Call) -> None:
        id = call.request.request_id
        if id in self._calls:
            raise InvalidRequest(f"request {id!r} is already running", param="request_id")
        self._calls[id] = call

    def _leave(self, call: Call) -> None:
        id = call.request.request_id
        if self._calls.get(id) is call:
            del self._calls[id]

    async def _prompt_of(self, call: Call) -> list[int]:
        request = call.request
        keep = self.kept_of(request.truncate_prompt_tokens, request.params.max_tokens)
        if isinstance(request.prompt, str):
            ids = self._prompt_ids(request.prompt, add_special_tokens=request.add_special_tokens, name="prompt", keep=keep)
            return await call.prepare(ids)
        prompt = request.prompt if keep is None else request.prompt[-keep:]
        self._check_length(prompt, "prompt")
        return prompt

    async def _completed(self, request: GenerationRequest, prompt: list[int]) -> GenerationRequest:
        """Return `request` with the parameters that depend on the model, its tokenizer and the prompt's length."""
        if not request.spaces_between_special_tokens and not request.skip_special_tokens and self._text.joins_with_spaces:
            raise UnsupportedField(
                "spaces_between_special_tokens false is not supported for this model: its tokenizer writes spaces between tokens",
                param="spaces_between_special_tokens",
            )
        params = request.params
        words = params.bad_words + self.defaults.bad_words
        vocab_size = self._client.info.limits.vocab_size
        changes: dict[str, Any] = {"end_token_ids": self._end_ids} if self._end_ids else {}
        if request.bad_words:
            words += await self._text_work.bad_words(request.bad_words)
        if words:  # a sequence with a token that the model does not have is never generated
            changes["bad_words"] = tuple(word for word in words if max(word) < vocab_size)
        if request.fits_max_tokens:
            changes["max_tokens"] = min(params.max_tokens, self.max_model_len - len(prompt))
        return msgspec.structs.replace(request, params=msgspec.structs.replace(params, **changes)) if changes else request

    async def _check_ids(self, ids: Sequence[int], name: str) -> None:
        for start in range(0, len(ids), _CHECKED_IDS):
            check_ids(ids[start : start + _CHECKED_IDS], self._client.info.limits.vocab_size, name)
            await asyncio.sleep(0)

    async def _prompt_ids(self, text: str, *, add_special_tokens: bool, name: str, keep: int | None) -> list[int]:
        """Return the token ids of a prompt, or the last `keep` of them.

        Raises ContextTooLong, naming the field `name`, if the prompt is too long.
        """
        if keep is not None:
            ids = (await self._text_work.encode(text, add_special_tokens=add_special_tokens))[-keep:]
            self._check_length(ids, name)
            return ids
        limit = self.max_model_len - 1
        try:
            return await self._text_work.encode(text, add_special_tokens=add_special_tokens, limit=limit)
        except TooManyTokens:
            raise prompt_too_long(None, self.max_model_len, name) from None

    def _check_length(self, ids: Sequence[int], name: str) -> None:
        if len(ids) >= self.max_model_len:
            raise prompt_too_long(len(ids), self.max_model_len, name)


def _use_client_names(error: TidegateError, names: dict[str, str]) -> None:
    """Use the client's own names of fields in `error`, if the client's API has other names for them than the service."""
    message = error.message
    for ours, theirs in names.items():
        if message.startswith(f"{ours} "):
            message = theirs + message[len(ours) :]
        # A name with an underscore is no English word, so each place with it means the field.
        message = message.replace(ours if "_" in ours else f" in the {ours},", theirs if "_" in ours else f" in the {theirs},")
    error.message = message
    error.args = (message,)
    error.param = names.get(error.param, error.param) if error.param is not None else None


def _render(template: ChatTemplate, conversation: Conversation) -> str:
    for name, value in conversation.inputs():
        for text in strings_in(value):
            check_text(text, name)
    return template.render(conversation)
