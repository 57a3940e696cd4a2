"""Serves POST /tokenize and POST /detokenize, which convert between text and token ids."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.http.body import read_json
from server.http.routes.api import JsonBody, api_of, errors, json_response
from server.http.schemas.service import DetokenizeBody, DetokenizeResponse, TokenizeBody, TokenizeResponse

router = APIRouter(tags=["tokens"])
_ERRORS = errors(400, 403, 404, 408, 413, 415, 429, 499, 500, 503)


@router.post("/tokenize", responses={200: {"model": TokenizeResponse}, **_ERRORS}, openapi_extra=JsonBody(TokenizeBody))
async def tokenize(request: Request) -> Response:
    """Turn text, or messages rendered by the model's chat template, into token ids."""
    api = api_of(request)
    body = await read_json(request, TokenizeBody, api)
    if body.prompt is None:
        add_special_tokens = bool(body.add_special_tokens)
        tokens = await api.service.chat_tokens(body.conversation, model=body.model, add_special_tokens=add_special_tokens)
    else:
        add_special_tokens = body.add_special_tokens is not False
        tokens = await api.service.tokenize(body.prompt, model=body.model, add_special_tokens=add_special_tokens)
    return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": api.service.max_model_len})


@router.post("/detokenize", responses={200: {"model": DetokenizeResponse}, **_ERRORS}, openapi_extra=JsonBody(DetokenizeBody))
async def detokenize(request: Request) -> Response:
    """Turn token ids into text."""
    api = api_of(request)
    body = await read_json(request, DetokenizeBody, api)
    skip = bool(body.skip_special_tokens)
    return json_response({"prompt": await api.service.detokenize(body.tokens, model=body.model, skip_special_tokens=skip)})
