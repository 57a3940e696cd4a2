"""GET /health/live, /health/ready and /health/startup, for probes.

live says that this process runs its event loop. ready says that every API worker has reached an engine since the server started,
and that this worker's engine makes progress now. startup says that ready was true once.
HEAD answers as GET does, without the body: some load balancers probe so.
"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.http.routes.api import api_of, json_response
from server.http.schemas.service import Health

router = APIRouter(tags=["service"])
_PROBE = {
    200: {"model": Health, "description": "Yes."},
    503: {"model": Health, "description": "No; `reason` says why."},
}


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live", responses={200: {"model": Health, "description": "Yes."}})
async def live() -> Response:
    """Does the process run?"""
    return json_response({"status": "ok", "reason": None})


@router.head("/health/ready", include_in_schema=False)
@router.get("/health/ready", responses=_PROBE)  # type: ignore[arg-type]
async def ready(request: Request) -> Response:
    """Can it serve now: is the engine reached, its heartbeat fresh, and its work going on?"""
    health = api_of(request).service.health()
    return _answer(health.ready, health.reason)


@router.head("/health/startup", include_in_schema=False)
@router.get("/health/startup", responses=_PROBE)  # type: ignore[arg-type]
async def startup(request: Request) -> Response:
    """Has it been ready once since it started?"""
    health = api_of(request).service.health()
    return _answer(health.started, health.reason or "the engine has not been ready yet")


def _answer(yes: bool, reason: str | None) -> Response:
    if yes:
        return json_response({"status": "ok", "reason": None})
    return json_response({"status": "unavailable", "reason": reason or "not ready"}, 503)
