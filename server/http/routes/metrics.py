"""Serves GET /metrics in Prometheus's text format."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.http.routes.api import api_of

router = APIRouter(tags=["service"])
_TEXT = {200: {"description": "Metrics in Prometheus's text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}}


@router.get("/metrics", responses=_TEXT, response_class=Response)  # type: ignore[arg-type]
async def metrics(request: Request) -> Response:
    """Counters, gauges and histograms of the server, over all API workers and the engine."""
    text, content_type = api_of(request).metrics.render()
    return Response(text, headers={"content-type": content_type})
