"""POST /tokenize and /detokenize."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.http.body import read_json
from server.http.routes.api import api_of, errors, json_response, takes
from server.http.schemas.service import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse

router = APIRouter(tags=["tokens"])
_ERRORS = errors(400, 404, 408, 413, 422, 429, 499, 500, 503)


@router.post("/tokenize", responses={200: {"model": TokenizeResponse}, **_ERRORS}, openapi_extra=takes(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """Text to token ids."""
    api = api_of(request)
    asked = await read_json(request, TokenizeRequest, api.max_body_bytes)
    tokens = await api.service.tokenize(asked.prompt, model=asked.model, add_special_tokens=asked.add_special_tokens is not False)
    return json_response({"tokens": tokens, "count": len(tokens), "max_model_len": api.service.max_model_len})


@router.post("/detokenize", responses={200: {"model": DetokenizeResponse}, **_ERRORS}, openapi_extra=takes(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """Token ids to text."""
    api = api_of(request)
    asked = await read_json(request, DetokenizeRequest, api.max_body_bytes)
    return json_response({"prompt": await api.service.detokenize(list(asked.tokens), model=asked.model)})
