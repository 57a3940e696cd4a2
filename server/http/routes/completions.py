"""POST /v1/completions, as OpenAI has it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engine.request import TokenLogprobs
from server.http.body import read_json
from server.http.disconnect import while_connected
from server.http.routes.api import EVENT_STREAM, GENERATION_ERRORS, Api, api_of, json_response, new_id, now, openai_usage, takes
from server.http.routes.collect import Output, collect_all, merge, total_usage
from server.http.routes.logprobs import completion_form, prompt_form
from server.http.schemas.openai import CompletionRequest, CompletionResponse
from server.http.sse import DONE, EventStream, event
from server.service.types import ANONYMOUS, Chunk, Ending, GenerationRequest

router = APIRouter(tags=["openai"])


class Prompt(msgspec.Struct, frozen=True):
    """One of a call's prompts. `echo_text` is what its choices begin with; None without `echo`."""

    ask: str | list[int]
    echo_text: str | None = None
    first_token: int | None = None


@router.post(
    "/v1/completions",
    responses={200: {"model": CompletionResponse, "content": EVENT_STREAM}, **GENERATION_ERRORS},
    openapi_extra=takes(CompletionRequest),
)
async def completions(request: Request) -> Response:
    """Continue one prompt or several."""
    api = api_of(request)
    asked = await read_json(request, CompletionRequest, api.max_body_bytes)
    prompts = [await _prompt(api, asked, ask) for ask in asked.prompts]
    id = new_id("cmpl")
    calls = _calls(asked, prompts, id)
    if len(calls) > 1:
        _check_together(api, calls)
    streams = [api.service.generate(call, ANONYMOUS) for call in calls]
    writer = _Writer(api, asked, prompts, id)
    if asked.stream:
        return EventStream(writer.events(merge(streams, asked.num_outputs)))
    outputs, endings = await while_connected(request.receive, collect_all(streams, asked.num_outputs))
    return json_response(writer.whole(outputs, endings))


async def _prompt(api: Api, asked: CompletionRequest, ask: str | list[int]) -> Prompt:
    if not asked.echo and asked.prompt_logprobs is None:
        return Prompt(ask)
    tokens = await api.service.tokenize(ask, model=asked.model, as_prompt=True) if isinstance(ask, str) else ask
    if not asked.echo:
        return Prompt(tokens)
    text = ask if isinstance(ask, str) else await api.service.detokenize(ask, model=asked.model, as_prompt=True)
    return Prompt(tokens, text, tokens[0] if tokens else None)


def _calls(asked: CompletionRequest, prompts: list[Prompt], id: str) -> list[GenerationRequest]:
    params = asked.sampling(max_tokens=asked.max_tokens, logprobs=asked.logprobs)
    if asked.echo and asked.logprobs is not None and params.prompt_logprobs is None:
        params = msgspec.structs.replace(params, prompt_logprobs=asked.logprobs)
    return [
        GenerationRequest(
            request_id=id if len(prompts) == 1 else f"{id}-{i}",
            prompt=prompt.ask,
            params=params,
            model=asked.model,
            n=asked.num_outputs,
            stop=asked.stop_strings,
            priority=asked.priority or 0,
            client_names={} if len(prompts) == 1 else {"prompt": f"prompt[{i}]"},
            num_prompts=len(prompts),
        )
        for i, prompt in enumerate(prompts)
    ]


def _check_together(api: Api, calls: list[GenerationRequest]) -> None:
    """Where log-probabilities of prompts are asked for, `_prompt` has made tokens of them all."""
    api.service.check_logprobs(
        calls[0].params,
        prompt_tokens=sum(len(call.prompt) for call in calls),
        outputs=sum(call.n for call in calls),
    )


class _Writer:
    """Writes the answer of one call."""

    def __init__(self, api: Api, asked: CompletionRequest, prompts: list[Prompt], id: str) -> None:
        self.asked = asked
        self.prompts = prompts
        self.text_of = api.service.token_text
        self.head = {"id": id, "object": "text_completion", "created": now(), "model": api.service.model_name}
        self.offsets: dict[int, int] = {}  # of each choice: characters written so far

    def whole(self, outputs: list[Output], endings: list[Ending]) -> dict[str, Any]:
        choices = [
            self._choice(
                Chunk(
                    index=output.index,
                    text=output.text,
                    token_ids=output.token_ids,
                    finish_reason=output.finish_reason,
                    stop_reason=output.stop_reason,
                    logprobs=output.logprobs,
                    prompt_logprobs=output.prompt_logprobs,
                )
            )
            for output in outputs
        ]
        return {**self.head, "choices": choices, "usage": openai_usage(total_usage(endings))}

    async def events(self, stream: AsyncGenerator[Chunk | Ending, None]) -> AsyncGenerator[bytes, None]:
        dumps = orjson.dumps
        head = b"data: " + dumps(self.head)[:-1] + b',"choices":[{"index":'
        tail = b',"logprobs":null,"finish_reason":null}]' + (b',"usage":null}\n\n' if self.asked.wants_usage else b"}\n\n")
        simple = not self.asked.echo and self.asked.logprobs is None and self.asked.prompt_logprobs is None
        end = {"usage": None} if self.asked.wants_usage else {}
        endings: list[Ending] = []
        async with aclosing(stream):
            async for item in stream:
                if isinstance(item, Ending):
                    endings.append(item)
                elif simple and item.finish_reason is None:
                    yield b'%b%d,"text":%b%b' % (head, item.index, dumps(item.text), tail)
                else:
                    yield event(dumps({**self.head, "choices": [self._choice(item)], **end}))
        if self.asked.wants_usage:
            yield event(dumps({**self.head, "choices": [], "usage": openai_usage(total_usage(endings))}))
        yield DONE

    def _choice(self, chunk: Chunk) -> dict[str, Any]:
        prompt = self.prompts[chunk.index // self.asked.num_outputs]
        first = chunk.index not in self.offsets
        text = (prompt.echo_text or "") + chunk.text if first else chunk.text
        choice = {
            "index": chunk.index,
            "text": text,
            "logprobs": self._logprobs(chunk, prompt, self._offset(chunk, prompt)),
            "finish_reason": chunk.finish_reason,
        }
        self.offsets[chunk.index] = self.offsets.get(chunk.index, 0) + len(text)
        if chunk.finish_reason is not None:
            choice["stop_reason"] = chunk.stop_reason
        if chunk.prompt_logprobs is not None and self.asked.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_form(chunk.prompt_logprobs, self.text_of)
        return choice

    def _offset(self, chunk: Chunk, prompt: Prompt) -> int:
        """Where in the choice's text the chunk's log-probabilities begin: past an echoed prompt that has none in it."""
        if chunk.prompt_logprobs is None and chunk.index not in self.offsets:
            return len(prompt.echo_text or "")
        return self.offsets.get(chunk.index, 0)

    def _logprobs(self, chunk: Chunk, prompt: Prompt, offset: int) -> dict[str, Any] | None:
        if self.asked.logprobs is None or chunk.logprobs is None:
            return None
        positions: list[TokenLogprobs | None] = list(chunk.logprobs)
        if self.asked.echo and chunk.prompt_logprobs is not None:
            positions = [*chunk.prompt_logprobs, *positions]
        return completion_form(positions, prompt.first_token, self.asked.logprobs, offset, self.text_of)
