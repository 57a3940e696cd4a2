"""Serves POST /v1/generate, Tidegate's own route, whose answers have token ids beside text."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.http.body import read_json
from server.http.front import call_of
from server.http.json_parts import Parts, PartsResponse, list_parts, object_parts
from server.http.routes.answer import respond
from server.http.routes.api import EVENT_STREAM, GENERATION_ERRORS, Api, JsonBody, api_of, new_id
from server.http.routes.collect import CollectedOutput
from server.http.routes.logprobs import ItemList, Written, own_item, write_each, written_parts
from server.http.schemas.generate import GenerateBody, GenerateResponse
from server.http.sse import DONE, event_pieces
from server.service.types import Chunk, Ending

router = APIRouter(tags=["generate"])
_CACHE = "off"  # the answer's field `cache`: the server has no response cache yet


@router.post(
    "/v1/generate",
    responses={200: {"model": GenerateResponse, "content": EVENT_STREAM}, **GENERATION_ERRORS},
    openapi_extra=JsonBody(GenerateBody),
)
async def generate(request: Request) -> Response:
    """Continue a prompt. The answer has text and tokens, whole or as server-sent events."""
    api = api_of(request)
    body = await read_json(request, GenerateBody, api)
    id = new_id("gen")
    call_of(request.scope).answered_by(id)
    generation = body.generation_request(id, api.service.defaults)
    return await respond(request, _Answer(api, body, id), [generation], stream=bool(body.stream))


class _Answer:
    """Writes the answer to one request of POST /v1/generate."""

    def __init__(self, api: Api, body: GenerateBody, id: str) -> None:
        self._ids = {"id": id} if body.request_id is None else {"id": id, "request_id": body.request_id}
        self._model = api.service.model_name
        self._n = body.num_outputs
        self._pacer = api.pacer
        item = own_item(api.service.token_text)
        self.write_logprobs = write_each(lambda: ItemList(item), lambda: ItemList(item))

    def whole(self, outputs: list[CollectedOutput], endings: list[Ending]) -> Response:
        fields = {**self._ids, "model": self._model, **_prompt(outputs[0].prompt_token_ids), **_end(endings[0])}
        return PartsResponse(object_parts(fields, {"outputs": list_parts(map(_output, outputs))}))

    async def events(self, stream: AsyncGenerator[Chunk | Ending, None]) -> AsyncGenerator[bytes, None]:
        dumps = orjson.dumps
        head = b"data: " + dumps(self._ids)[:-1] + b',"index":'
        unfinished = self._n
        last: dict[str, Any] = {}
        written: Written = {}
        async with aclosing(stream):
            async for item in stream:
                if isinstance(item, Ending):
                    for piece in event_pieces(self._event({**last, "model": self._model, **_end(item)}, written)):
                        yield piece
                elif (
                    item.finish_reason is None
                    and item.logprobs is None
                    and item.prompt_logprobs is None
                    and not item.prompt_token_ids
                ):
                    yield b'%b%d,"text":%b,"token_ids":%b}\n\n' % (head, item.index, dumps(item.text), dumps(item.token_ids))
                else:
                    last, written = _chunk(item), {}
                    await self._pacer.run(self.write_logprobs(item, written))
                    unfinished -= item.finish_reason is not None
                    if unfinished:  # the last chunk of the request shares its event with the Ending, which comes next
                        for piece in event_pieces(self._event(last, written)):
                            yield piece
        yield DONE

    def _event(self, fields: dict[str, Any], written: Written) -> Parts:
        return object_parts({**self._ids, **fields}, written_parts(written))


def _chunk(chunk: Chunk) -> dict[str, Any]:
    fields: dict[str, Any] = {"index": chunk.index, "text": chunk.text, "token_ids": chunk.token_ids}
    fields |= _prompt(chunk.prompt_token_ids)
    if chunk.finish_reason is not None:
        fields |= {"finish_reason": chunk.finish_reason, "stop_reason": chunk.stop_reason}
    return fields


def _prompt(ids: list[int] | None) -> dict[str, Any]:
    return {} if ids is None else {"prompt_token_ids": ids}


def _output(output: CollectedOutput) -> Parts:
    fields = {
        "index": output.index,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }
    return object_parts(fields, written_parts(output.written))


def _end(ending: Ending) -> dict[str, Any]:
    usage = ending.usage
    return {
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "cached_tokens_by_tier": msgspec.structs.asdict(usage.cached),
            "completion_tokens": usage.completion_tokens,
        },
        "timing": {name: round(ms, 3) for name, ms in msgspec.structs.asdict(ending.timing).items()},
        "cache": _CACHE,
    }
