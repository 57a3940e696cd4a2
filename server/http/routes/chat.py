"""POST /v1/chat/completions, as OpenAI has it: text messages in, one assistant message out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.http.body import read_json
from server.http.disconnect import while_connected
from server.http.routes.api import EVENT_STREAM, GENERATION_ERRORS, Api, api_of, json_response, new_id, now, openai_usage, takes
from server.http.routes.collect import Output, collect
from server.http.routes.logprobs import chat_form, prompt_form
from server.http.schemas.openai import ChatRequest, ChatResponse
from server.http.sse import DONE, EventStream, event
from server.service.types import ANONYMOUS, Chunk, Ending, GenerationRequest

router = APIRouter(tags=["openai"])


@router.post(
    "/v1/chat/completions",
    responses={200: {"model": ChatResponse, "content": EVENT_STREAM}, **GENERATION_ERRORS},
    openapi_extra=takes(ChatRequest),
)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    api = api_of(request)
    asked = await read_json(request, ChatRequest, api.max_body_bytes)
    call = await _call(api, asked, new_id("chatcmpl"))
    stream = api.service.generate(call, ANONYMOUS)
    head = {"id": call.request_id, "created": now(), "model": api.service.model_name}
    if asked.stream:
        return EventStream(_events(api, asked, head, stream))
    outputs, ending = await while_connected(request.receive, collect(stream, call.n))
    return json_response(_whole(api, head, outputs, ending))


async def _call(api: Api, asked: ChatRequest, id: str) -> GenerationRequest:
    messages = [{"role": message.role, "content": message.text} for message in asked.messages]
    tokens = await api.service.chat_tokens(messages)
    limit = asked.output_limit
    return GenerationRequest(
        request_id=id,
        prompt=tokens,
        params=asked.sampling(
            max_tokens=max(1, api.service.max_model_len - len(tokens)) if limit is None else limit,
            logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        ),
        model=asked.model,
        n=asked.num_outputs,
        stop=asked.stop_strings,
        priority=asked.priority or 0,
        add_special_tokens=False,
        client_names=asked.client_names,
    )


def _whole(api: Api, head: dict[str, Any], outputs: list[Output], ending: Ending) -> dict[str, Any]:
    text_of = api.service.token_text
    choices = [
        {
            "index": output.index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": None if output.logprobs is None else chat_form(output.logprobs, text_of, api.service.token_bytes),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        for output in outputs
    ]
    answer = {**head, "object": "chat.completion", "choices": choices, "usage": openai_usage(ending.usage)}
    if outputs[0].prompt_logprobs is not None:
        answer["prompt_logprobs"] = prompt_form(outputs[0].prompt_logprobs, text_of)
    return answer


async def _events(
    api: Api, asked: ChatRequest, names: dict[str, Any], stream: AsyncGenerator[Chunk | Ending, None]
) -> AsyncGenerator[bytes, None]:
    dumps = orjson.dumps
    head = {**names, "object": "chat.completion.chunk"}
    end = {"usage": None} if asked.wants_usage else {}
    prefix = b"data: " + dumps(head)[:-1] + b',"choices":[{"index":'
    suffix = b'},"logprobs":null,"finish_reason":null}]' + (b',"usage":null}\n\n' if asked.wants_usage else b"}\n\n")
    begun: set[int] = set()
    usage = None
    async with aclosing(stream):
        async for item in stream:
            if isinstance(item, Ending):
                usage = openai_usage(item.usage)
                continue
            if item.index not in begun:
                begun.add(item.index)
                role = {"index": item.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                first = {**head, "choices": [{**role, "logprobs": None}], **end}
                if item.prompt_logprobs is not None:
                    first["prompt_logprobs"] = prompt_form(item.prompt_logprobs, api.service.token_text)
                yield event(dumps(first))
            if item.finish_reason is None and item.logprobs is None:
                yield b'%b%d,"delta":{"content":%b%b' % (prefix, item.index, dumps(item.text), suffix)
            else:
                yield event(dumps({**head, "choices": [_delta(api, item)], **end}))
    if asked.wants_usage:
        yield event(dumps({**head, "choices": [], "usage": usage}))
    yield DONE


def _delta(api: Api, chunk: Chunk) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": chunk.index,
        "delta": {"content": chunk.text} if chunk.text else {},
        "logprobs": None
        if chunk.logprobs is None
        else chat_form(chunk.logprobs, api.service.token_text, api.service.token_bytes),
        "finish_reason": chunk.finish_reason,
    }
    if chunk.finish_reason is not None:
        choice["stop_reason"] = chunk.stop_reason
    return choice
