"""Serves GET /v1/models and GET /v1/models/{model}, which describe the models of this server."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import UnknownModel
from server.http.routes.api import api_of, errors, json_response
from server.http.schemas.service import ModelCard, ModelList

router = APIRouter(tags=["models"])


@router.get("/v1/models", responses={200: {"model": ModelList}, **errors(500, 503)})
async def list_models(request: Request) -> Response:
    """List the models of this server."""
    return json_response({"object": "list", "data": _cards(request)})


@router.get("/v1/models/{model:path}", responses={200: {"model": ModelCard}, **errors(404, 500, 503)})
async def get_model(request: Request, model: str) -> Response:
    """Describe one model of this server."""
    for card in _cards(request):
        if card["id"] == model:
            return json_response(card)
    raise UnknownModel(f"this server has no model {model[:256]!r}: /v1/models lists its models", param="model")


def _cards(request: Request) -> list[dict[str, object]]:
    return [
        {
            "id": model.id,
            "object": "model",
            "created": model.created,
            "owned_by": model.owned_by,
            "root": model.id,
            "parent": None,
            "max_model_len": model.max_model_len,
            "default_sampling_params": model.default_sampling_params,
        }
        for model in api_of(request).service.models()
    ]
