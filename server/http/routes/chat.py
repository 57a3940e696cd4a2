"""Serves POST /v1/chat/completions as OpenAI defines it: a request has text messages, and each output is one assistant
message."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.http.body import read_json
from server.http.front import call_of
from server.http.json_parts import Parts, PartsResponse, list_parts, object_parts
from server.http.routes.answer import respond
from server.http.routes.api import EVENT_STREAM, GENERATION_ERRORS, Api, JsonBody, api_of, new_id, now, openai_usage
from server.http.routes.collect import CollectedOutput
from server.http.routes.extras import EventExtras
from server.http.routes.logprobs import (
    ChatLogprobsJson,
    ItemList,
    Written,
    chat_item,
    prompt_item,
    write_each,
    written_parts,
)
from server.http.schemas.openai import ChatBody, ChatResponse
from server.http.sse import DONE, event, event_pieces
from server.service.call_log import CallRecord
from server.service.types import Chunk, Ending, GenerationRequest

router = APIRouter(tags=["openai"])


@router.post(
    "/v1/chat/completions",
    responses={200: {"model": ChatResponse, "content": EVENT_STREAM}, **GENERATION_ERRORS},
    openapi_extra=JsonBody(ChatBody),
)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    api = api_of(request)
    body = await read_json(request, ChatBody, api)
    call, id = call_of(request.scope), new_id("chatcmpl")
    call.answered_by(id)
    generation = await _generation_request(api, body, id)
    return await respond(request, _Answer(api, body, id, call), [generation], stream=bool(body.stream))


async def _generation_request(api: Api, body: ChatBody, id: str) -> GenerationRequest:
    limit, defaults = body.output_limit, api.service.defaults
    usual = int(defaults.params.get("max_tokens", 0))  # what the author allows; 0 for what is left of the context
    tokens = await api.service.chat_tokens(
        body.conversation,
        model=body.model,
        add_special_tokens=bool(body.add_special_tokens),
        as_prompt=True,
        keep=api.service.kept_of(body.truncate_prompt_tokens, usual if limit is None else limit),
    )
    if limit is None:
        rest = max(1, api.service.max_model_len - len(tokens))
        limit = min(rest, usual or rest)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = body.sampling(defaults, max_tokens=limit, logprobs=logprobs)
    return body.request_of(id, tokens, params, add_special_tokens=False, client_names=body.client_names)


class _Answer:
    """Writes the answer to one request of POST /v1/chat/completions."""

    def __init__(self, api: Api, body: ChatBody, id: str, call: CallRecord) -> None:
        self._head = {"id": id, "created": now(), "model": api.service.model_name, **body.tier}
        self._extras = EventExtras(body.event_options, call)
        self._wants_ids = bool(body.return_token_ids)
        self._pacer = api.pacer
        text = api.service.token_text
        chosen, prompt = chat_item(text, api.service.token_bytes), prompt_item(text)
        self.write_logprobs = write_each(lambda: ChatLogprobsJson(chosen), lambda: ItemList(prompt))

    def whole(self, outputs: list[CollectedOutput], endings: list[Ending]) -> Response:
        fields = {**self._head, "object": "chat.completion", "usage": openai_usage(endings[0].usage)}
        if outputs[0].prompt_token_ids is not None:
            fields["prompt_token_ids"] = outputs[0].prompt_token_ids
        prompt = written_parts(outputs[0].written, "prompt_logprobs")
        return PartsResponse(object_parts(fields, {"choices": list_parts(map(self._choice, outputs)), **prompt}))

    async def events(self, stream: AsyncGenerator[Chunk | Ending, None]) -> AsyncGenerator[bytes, None]:
        dumps = orjson.dumps
        extras = self._extras
        head = {**self._head, "object": "chat.completion.chunk", **extras.head}
        prefix = b"data: " + dumps(head)[:-1] + b',"choices":[{"index":'
        suffix = b'},"logprobs":null,"finish_reason":null}]}\n\n'
        begun: set[int] = set()
        usage = None
        async with aclosing(stream):
            async for item in stream:
                if isinstance(item, Ending):
                    usage = item.usage
                    continue
                written: Written = {}
                if item.logprobs is not None or item.prompt_logprobs is not None:
                    await self._pacer.run(self.write_logprobs(item, written))
                if item.index not in begun:
                    begun.add(item.index)
                    prompt = written_parts(written, "prompt_logprobs")
                    first = head if item.prompt_token_ids is None else {**head, "prompt_token_ids": item.prompt_token_ids}
                    for piece in event_pieces(
                        object_parts({**first, **extras.fields(None)}, {"choices": [dumps([_role(item.index)])], **prompt})
                    ):
                        yield piece
                if item.finish_reason is None and item.logprobs is None and not (self._wants_ids or extras.any):
                    yield b'%b%d,"delta":{"content":%b%b' % (prefix, item.index, dumps(item.text), suffix)
                else:
                    choices = list_parts([self._delta(item, written)])
                    for piece in event_pieces(object_parts({**head, **extras.fields(item)}, {"choices": choices})):
                        yield piece
        last = extras.last(usage)
        if last is not None:
            yield event(dumps({**head, **last}))
        yield DONE

    def _choice(self, output: CollectedOutput) -> Parts:
        fields: dict[str, Any] = {
            "index": output.index,
            "message": {"role": "assistant", "content": output.text, "refusal": None},
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if self._wants_ids:
            fields["token_ids"] = output.token_ids
        return object_parts(fields, {"logprobs": [b"null"], **written_parts(output.written, "logprobs")})

    def _delta(self, chunk: Chunk, written: Written) -> Parts:
        fields: dict[str, Any] = {
            "index": chunk.index,
            "delta": {"content": chunk.text} if chunk.text else {},
            "finish_reason": chunk.finish_reason,
        }
        if chunk.finish_reason is not None:
            fields["stop_reason"] = chunk.stop_reason
        if self._wants_ids:
            fields["token_ids"] = chunk.token_ids
        return object_parts(fields, {"logprobs": [b"null"], **written_parts(written, "logprobs")})


def _role(index: int) -> dict[str, Any]:
    """Return the choice for the first event of a streamed output. It has the role of the message, and no text."""
    return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
