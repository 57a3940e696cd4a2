"""Serves POST /v1/completions, as OpenAI defines it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

import msgspec
import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engine.request import SamplingParams
from server.http.body import read_json
from server.http.front import call_of
from server.http.json_parts import Parts, PartsResponse, list_parts, object_parts
from server.http.routes.answer import respond
from server.http.routes.api import EVENT_STREAM, GENERATION_ERRORS, Api, JsonBody, api_of, new_id, now, openai_usage
from server.http.routes.collect import CollectedOutput, total_usage
from server.http.routes.extras import EventExtras
from server.http.routes.logprobs import (
    CompletionLogprobsJson,
    ItemList,
    Written,
    field_of,
    prompt_item,
    written_parts,
)
from server.http.schemas.openai import CompletionBody, CompletionResponse
from server.http.sse import DONE, event, event_pieces
from server.service.call_log import CallRecord
from server.service.types import Chunk, Ending, GenerationRequest

router = APIRouter(tags=["openai"])


class Prompt(msgspec.Struct, frozen=True):
    """Holds one of the prompts of a request of POST /v1/completions."""

    content: str | list[int]  # the prompt for the service, as text or as token ids
    echo_text: str = ""  # if the request sets `echo`: the prompt's text, with which its choices begin
    offsets: list[int] = []  # if the request sets `echo`: where in `echo_text` the text of each token begins
    first_token: int | None = None  # if the request sets `echo`: the prompt's first token id


@router.post(
    "/v1/completions",
    responses={200: {"model": CompletionResponse, "content": EVENT_STREAM}, **GENERATION_ERRORS},
    openapi_extra=JsonBody(CompletionBody),
)
async def completions(request: Request) -> Response:
    """Continue one prompt or several."""
    api = api_of(request)
    body = await read_json(request, CompletionBody, api)
    call, id = call_of(request.scope), new_id("cmpl")
    call.answered_by(id)
    params = body.sampling(api.service.defaults, max_tokens=body.max_tokens, logprobs=body.logprobs)
    keep = api.service.kept_of(body.truncate_prompt_tokens, params.max_tokens)
    prompts = [await _prompt(api, body, content, keep) for content in body.prompts]
    requests = _requests(body, params, prompts, id)
    if len(requests) > 1:
        _check_together(api, requests)
    return await respond(request, _Answer(api, body, prompts, id, call), requests, stream=bool(body.stream))


async def _prompt(api: Api, body: CompletionBody, content: str | list[int], keep: int | None) -> Prompt:
    """Make the Prompt for `content`, of which the last `keep` tokens are used (None: all).

    The text is tokenised here if `echo` or the limit on log-probabilities needs its tokens.
    """
    if not body.echo and body.prompt_logprobs is None:
        return Prompt(content)
    if isinstance(content, str):
        tokens = await api.service.tokenize(content, model=body.model, as_prompt=True, keep=keep)
    else:
        tokens = content if keep is None else content[-keep:]
    if not body.echo:
        return Prompt(tokens)
    is_whole = keep is None or len(tokens) < keep
    text, offsets = await api.service.prompt_text(
        content if isinstance(content, str) and is_whole else None,
        tokens,
        skip_special_tokens=body.skip_special_tokens is not False,
    )
    return Prompt(tokens, text, offsets, tokens[0] if tokens else None)


def _requests(body: CompletionBody, params: SamplingParams, prompts: list[Prompt], id: str) -> list[GenerationRequest]:
    if body.echo and body.logprobs is not None and params.prompt_logprobs is None:
        params = msgspec.structs.replace(params, prompt_logprobs=body.logprobs)
    more = {"text_offsets": body.logprobs is not None, "fits_max_tokens": body.max_tokens is None, "num_prompts": len(prompts)}
    if len(prompts) == 1:
        return [body.request_of(id, prompts[0].content, params, **more)]
    return [
        body.request_of(f"{id}-{i}", prompt.content, params, client_names={"prompt": f"prompt[{i}]"}, **more)
        for i, prompt in enumerate(prompts)
    ]


def _check_together(api: Api, requests: list[GenerationRequest]) -> None:
    """Check the sum of the log-probabilities of all prompts against the service's limits. Raises InvalidRequest.

    If a request asks for log-probabilities of its prompts, `_prompt` has tokenised the prompts, so their lengths are in tokens.
    """
    api.service.check_logprobs(
        requests[0].params,
        prompt_tokens=sum(len(generation.prompt) for generation in requests),
        outputs=sum(generation.n for generation in requests),
    )


class _Answer:
    """Writes the answer to one request of POST /v1/completions."""

    def __init__(self, api: Api, body: CompletionBody, prompts: list[Prompt], id: str, call: CallRecord) -> None:
        self._body = body
        self._prompts = prompts
        self._extras = EventExtras(body.event_options, call)
        self._pacer = api.pacer
        self._text = api.service.token_text
        self._prompt_item = prompt_item(self._text)
        self._head = {"id": id, "object": "text_completion", "created": now(), "model": api.service.model_name, **body.tier}
        self._begun: set[int] = set()  # the choices whose first text was written

    def whole(self, outputs: list[CollectedOutput], endings: list[Ending]) -> Response:
        choices = [self._choice(output, output.written) for output in outputs]
        fields = {**self._head, "usage": openai_usage(total_usage(endings))}
        return PartsResponse(object_parts(fields, {"choices": list_parts(choices)}))

    async def events(self, stream: AsyncGenerator[Chunk | Ending, None]) -> AsyncGenerator[bytes, None]:
        dumps = orjson.dumps
        extras = self._extras
        head = {**self._head, **extras.head}
        prefix = b"data: " + dumps(head)[:-1] + b',"choices":[{"index":'
        suffix = b',"logprobs":null,"finish_reason":null}]}\n\n'
        body = self._body
        simple = not (body.echo or body.return_token_ids or extras.any)
        simple = simple and body.logprobs is None and body.prompt_logprobs is None
        endings: list[Ending] = []
        async with aclosing(stream):
            async for item in stream:
                if isinstance(item, Ending):
                    endings.append(item)
                elif simple and item.finish_reason is None:
                    yield b'%b%d,"text":%b%b' % (prefix, item.index, dumps(item.text), suffix)
                else:
                    choices = list_parts([await self._delta(item)])
                    for piece in event_pieces(object_parts({**head, **extras.fields(item)}, {"choices": choices})):
                        yield piece
        last = extras.last(total_usage(endings))
        if last is not None:
            yield event(dumps({**head, **last}))
        yield DONE

    async def _delta(self, chunk: Chunk) -> Parts:
        written: Written = {}
        await self._pacer.run(self.write_logprobs(chunk, written))
        return self._choice(chunk, written)

    def _choice(self, output: Chunk | CollectedOutput, written: Written) -> Parts:
        index, text = output.index, output.text
        if index not in self._begun:
            self._begun.add(index)
            text = self._prompt_of(index).echo_text + text
        fields: dict[str, Any] = {"index": index, "text": text, "finish_reason": output.finish_reason}
        if output.finish_reason is not None:
            fields["stop_reason"] = output.stop_reason
        if self._body.return_token_ids:
            fields["token_ids"] = output.token_ids
            if output.prompt_token_ids is not None:
                fields["prompt_token_ids"] = output.prompt_token_ids
        return object_parts(fields, {"logprobs": [b"null"], **written_parts(written)})

    def write_logprobs(self, chunk: Chunk, written: Written) -> Iterator[None]:
        """Append the log-probabilities of `chunk` to the fields of `written`. Yields between two slices of work.

        With `echo`, the log-probabilities of the prompt come first in the first choice of each prompt.
        """
        prompt, body = chunk.prompt_logprobs, self._body
        if body.logprobs is not None and chunk.logprobs is not None:
            echoed = self._prompt_of(chunk.index)
            field = field_of(
                written,
                "logprobs",
                lambda: CompletionLogprobsJson(body.logprobs or 0, self._text, first_token=echoed.first_token),
            )
            if body.echo and prompt is not None:
                field.add_offsets(echoed.offsets)
                yield from field.write(prompt)
            begin = len(echoed.echo_text)
            field.add_offsets([begin + offset for offset in chunk.text_offsets or ()])
            yield from field.write(chunk.logprobs)
        if body.prompt_logprobs is not None and prompt is not None:
            yield from field_of(written, "prompt_logprobs", lambda: ItemList(self._prompt_item)).write(prompt)

    def _prompt_of(self, index: int) -> Prompt:
        return self._prompts[index // self._body.num_outputs]
