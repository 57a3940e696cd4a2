"""Serves POST /cache/reset on the admin port."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from engine.messages import TIER_NAMES
from server.http.body import read_json
from server.http.routes.api import JsonBody, api_of, errors, json_response
from server.http.schemas.service import CacheResetBody, CacheResetResponse

router = APIRouter(tags=["cache"])


@router.post(
    "/cache/reset",
    responses={200: {"model": CacheResetResponse}, **errors(400, 403, 408, 413, 415, 499, 500, 503)},
    openapi_extra=JsonBody(CacheResetBody, required=False),
)
async def reset(request: Request) -> Response:
    """Make all engines forget the KV cache of prompts that were computed before. Running requests go on."""
    api = api_of(request)
    body = await read_json(request, CacheResetBody, api, optional=True)
    return json_response({"forgotten_blocks": await api.service.reset_cache(body.tiers or TIER_NAMES)})
