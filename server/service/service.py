"""GenerateService: the one path of a request, under HTTP and gRPC, streaming or not.

    door.check_request -> tokenise -> Call.submit: n siblings -> events -> Output.take -> Chunks, then one Ending

However a call ends (its generator is closed, its task is cancelled, its deadline passes, `abort` is called, an error comes),
what is left of it in the engine is aborted at once, in one `finally`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence

import msgspec

from engine.errors import Aborted, InternalError, InvalidRequest, TidegateError
from engine.messages import check_ids
from engine.request import SamplingParams
from server.engines.base import EngineClientProtocol, EngineHealth
from server.metrics.registry import Metrics
from server.service.call import Call
from server.service.checks import ServiceSettings, check_logprobs, check_model, check_request, check_text
from server.service.types import Chunk, Ending, GenerationRequest
from server.text.chat import Message
from server.text.tokenizer import Tokenizer

THREAD_CHARS = 2048  # longer texts (about 1 ms of work) are tokenised off the loop, so that other streams' tokens need not wait
THREAD_TOKENS = 8192  # likewise for token ids to text


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    created: int  # when this worker began to serve it, in seconds since 1970
    owned_by: str
    max_model_len: int


class GenerateService:
    """One a worker. Everything it raises is of `engine.errors`."""

    def __init__(
        self,
        client: EngineClientProtocol,
        text: Tokenizer,
        settings: ServiceSettings,
        metrics: Metrics,
        *,
        server_ready: Callable[[], bool] = lambda: True,
    ) -> None:
        """`server_ready` says whether all workers of the server have an engine; before that, this one is not ready either."""
        self._client = client
        self._server_ready = server_ready
        self._text = text
        self._settings = settings
        self._metrics = metrics
        self._created = int(time.time())
        self._calls: dict[str, Call] = {}

    @property
    def model_name(self) -> str:
        return self._settings.model_name

    @property
    def max_model_len(self) -> int:
        return self._client.info.limits.max_model_len

    @property
    def num_running(self) -> int:
        """Calls of `generate` that have begun and not ended."""
        return len(self._calls)

    async def generate(self, request: GenerationRequest, *, transport: str = "http") -> AsyncGenerator[Chunk | Ending, None]:
        """Chunks of all outputs as they come, then one Ending; or an exception. Closing it aborts the request."""
        meter = self._metrics.begin(transport)
        call = Call(request, meter)
        try:
            check_request(request, self._settings)
            self._enter(call)
            prompt = await self._prompt_of(request)
            check_logprobs(request.params, self._settings, prompt_tokens=len(prompt), outputs=request.n)
            call.submit(self._client, self._text, prompt)
            while call.unfinished:
                event = await call.next_event()
                if event is not None:
                    yield call.take(event)
            meter.finished(call.finish_reason)
            yield call.ending()
        except (GeneratorExit, asyncio.CancelledError):
            meter.aborted()
            raise
        except TidegateError as error:
            # A stream that we aborted ourselves raises Aborted; the call knows why.
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

    def check_logprobs(self, params: SamplingParams, *, prompt_tokens: int, outputs: int) -> None:
        """For a call of several prompts, whose answer is one: `generate` knows of one prompt each."""
        check_logprobs(params, self._settings, prompt_tokens=prompt_tokens, outputs=outputs)

    def abort(self, request_id: str) -> bool:
        """End a call of this worker: its generator raises Aborted. False where there is none of that id."""
        call = self._calls.get(request_id)
        if call is None:
            return False
        call.end(Aborted("the request was aborted"))
        return True

    async def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """The prompt that the model's chat template makes of `messages`."""
        template = self._text.chat
        if template is None:
            raise InvalidRequest(
                f"{self.model_name} has no chat template, so it cannot be asked in messages: use /v1/completions",
                param="messages",
            )
        for i, message in enumerate(messages):
            for value in _texts(message):
                check_text(value, f"messages[{i}]")
        if sum(len(value) for message in messages for value in _texts(message)) > THREAD_CHARS:
            prompt = await asyncio.to_thread(template.render, messages)
        else:
            prompt = template.render(messages)
        return await self._encode(prompt, add_special_tokens=False)  # the template has written them

    async def tokenize(self, text: str, *, model: str | None = None, add_special_tokens: bool = True) -> list[int]:
        check_model(model, self.model_name)
        check_text(text, "prompt")
        return await self._encode(text, add_special_tokens=add_special_tokens)

    async def detokenize(self, token_ids: Sequence[int], *, model: str | None = None) -> str:
        check_model(model, self.model_name)
        check_ids(token_ids, self._client.info.limits.vocab_size, "tokens")
        if len(token_ids) > THREAD_TOKENS:
            return await asyncio.to_thread(self._text.decode, token_ids)
        return self._text.decode(token_ids)

    def token_text(self, token: int) -> str:
        """One token by itself, for log-probabilities."""
        return self._text.token_text(token)

    def token_bytes(self, token: int) -> bytes:
        return self._text.token_bytes(token)

    def models(self) -> list[ModelInfo]:
        return [ModelInfo(id=self.model_name, created=self._created, owned_by="tidegate", max_model_len=self.max_model_len)]

    def health(self) -> EngineHealth:
        """The engine's health as this worker sees it; not ready and not started before all workers of the server are."""
        health = self._client.health
        if self._server_ready() or not health.ready:
            return health
        return msgspec.structs.replace(health, ready=False, started=False, reason="another API worker is still starting")

    def _enter(self, call: Call) -> None:
        id = call.request.request_id
        if id in self._calls:
            raise InvalidRequest(f"request {id!r} is under way already", param="request_id")
        self._calls[id] = call

    def _leave(self, call: Call) -> None:
        id = call.request.request_id
        if self._calls.get(id) is call:
            del self._calls[id]

    async def _prompt_of(self, request: GenerationRequest) -> list[int]:
        if isinstance(request.prompt, str):
            return await self._encode(request.prompt, add_special_tokens=request.add_special_tokens)
        return request.prompt

    async def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) > THREAD_CHARS:
            return await asyncio.to_thread(self._text.encode, text, add_special_tokens=add_special_tokens)
        return self._text.encode(text, add_special_tokens=add_special_tokens)


def _use_client_names(error: TidegateError, names: dict[str, str]) -> None:
    """Have `error` name the field that the client sent, where it knows it by another name than we do."""
    ours = error.param
    if ours is None or ours not in names:
        return
    error.param = names[ours]
    if error.message.startswith(f"{ours} "):
        error.message = names[ours] + error.message[len(ours) :]
        error.args = (error.message,)


def _texts(message: Message) -> list[str]:
    """Every text of a message, for checks before the template sees it."""
    content = message.get("content")
    parts = [part.get("text") for part in content if isinstance(part, dict)] if isinstance(content, list) else [content]
    return [value for value in [message.get("role"), *parts] if isinstance(value, str)]
