"""POST /v1/generate."""

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
from server.http.routes.api import EVENT_STREAM, GENERATION_ERRORS, api_of, json_response, new_id, takes
from server.http.routes.collect import Output, collect
from server.http.routes.logprobs import TokenText, own_list
from server.http.schemas.generate import GenerateRequest, GenerateResponse
from server.http.sse import DONE, EventStream, event
from server.service.types import ANONYMOUS, Chunk, Ending, GenerationRequest

router = APIRouter(tags=["generate"])
_CACHE = "off"  # there is no response cache yet


@router.post(
    "/v1/generate",
    responses={200: {"model": GenerateResponse, "content": EVENT_STREAM}, **GENERATION_ERRORS},
    openapi_extra=takes(GenerateRequest),
)
async def generate(request: Request) -> Response:
    """Continue a prompt: text and tokens, whole or as server-sent events."""
    api = api_of(request)
    asked = await read_json(request, GenerateRequest, api.max_body_bytes)
    id = new_id("gen")
    call = GenerationRequest(
        request_id=id,
        prompt=asked.text_or_tokens,
        params=asked.sampling(max_tokens=asked.max_tokens, logprobs=asked.logprobs),
        model=asked.model,
        n=asked.num_outputs,
        stop=asked.stop_strings,
        priority=asked.priority or 0,
        deadline_s=None if asked.deadline_ms is None else asked.deadline_ms / 1000,
        client_names=asked.client_names,
    )
    model = api.service.model_name
    names = {"id": id} if asked.request_id is None else {"id": id, "request_id": asked.request_id}
    stream = api.service.generate(call, ANONYMOUS)
    if asked.stream:
        return EventStream(_events(stream, names, model, call.n, api.service.token_text))
    outputs, ending = await while_connected(request.receive, collect(stream, call.n))
    whole = [_output(output, api.service.token_text) for output in outputs]
    return json_response({**names, "model": model, "outputs": whole, **_end(ending)})


async def _events(
    stream: AsyncGenerator[Chunk | Ending, None], names: dict[str, str], model: str, n: int, text: TokenText
) -> AsyncGenerator[bytes, None]:
    head = b"data: " + orjson.dumps(names)[:-1] + b',"index":'
    dumps = orjson.dumps
    last: dict[str, Any] = dict(names)
    async with aclosing(stream):
        async for item in stream:
            if isinstance(item, Ending):
                yield event(dumps({**last, "model": model, **_end(item)}))
            elif item.finish_reason is None and item.logprobs is None and item.prompt_logprobs is None:
                yield b'%b%d,"text":%b,"token_ids":%b}\n\n' % (head, item.index, dumps(item.text), dumps(item.token_ids))
            else:
                full = {**names, **_chunk(item, text)}
                n -= item.finish_reason is not None
                if n:
                    yield event(dumps(full))
                else:  # the Ending is next: one event says both
                    last = full
    yield DONE


def _chunk(chunk: Chunk, text: TokenText) -> dict[str, Any]:
    fields: dict[str, Any] = {"index": chunk.index, "text": chunk.text, "token_ids": chunk.token_ids}
    if chunk.finish_reason is not None:
        fields |= {"finish_reason": chunk.finish_reason, "stop_reason": chunk.stop_reason}
    if chunk.logprobs is not None:
        fields["logprobs"] = own_list(chunk.logprobs, text)
    if chunk.prompt_logprobs is not None:
        fields["prompt_logprobs"] = own_list(chunk.prompt_logprobs, text)
    return fields


def _output(output: Output, text: TokenText) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "index": output.index,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }
    if output.logprobs is not None:
        fields["logprobs"] = own_list(output.logprobs, text)
    if output.prompt_logprobs is not None:
        fields["prompt_logprobs"] = own_list(output.prompt_logprobs, text)
    return fields


def _end(ending: Ending) -> dict[str, Any]:
    usage, timing = ending.usage, ending.timing
    return {
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
        },
        "timing": {
            "queue_ms": round(timing.queue_ms, 3),
            "ttft_ms": round(timing.ttft_ms, 3),
            "total_ms": round(timing.total_ms, 3),
        },
        "cache": _CACHE,
    }
