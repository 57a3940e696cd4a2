"""Serves GET /health/live, /health/ready and /health/startup for health probes, and /health and /ping for tools of other servers.

`live` is true while this process runs its event loop. `ready` is true while every API worker has reached an engine since the
server started and this worker's engine makes progress. `startup` is true once `ready` has been true. `/health` and `/ping` answer
as `ready`. HEAD gets the same answer
without the body, because some load balancers probe with HEAD.
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
    503: {"model": Health, "description": "No. `reason` says why."},
}


@router.head("/health/live", include_in_schema=False)
@router.get("/health/live", responses={200: {"model": Health, "description": "Yes."}})
async def live() -> Response:
    """Whether the process runs."""
    return json_response({"status": "ok", "reason": None})


@router.head("/ping", include_in_schema=False)
@router.head("/health", include_in_schema=False)
@router.head("/health/ready", include_in_schema=False)
@router.get("/ping", responses=_PROBE)  # type: ignore[arg-type]
@router.get("/health", responses=_PROBE)  # type: ignore[arg-type]
@router.get("/health/ready", responses=_PROBE)  # type: ignore[arg-type]
async def ready(request: Request) -> Response:
    """Whether the server can generate tokens now: the engine is connected, its heartbeat is recent and its steps go on."""
    health = api_of(request).service.health()
    return _answer(health.ready, health.reason)


@router.head("/health/startup", include_in_schema=False)
@router.get("/health/startup", responses=_PROBE)  # type: ignore[arg-type]
async def startup(request: Request) -> Response:
    """Whether the server has been ready once since it started."""
    health = api_of(request).service.health()
    return _answer(health.started, health.reason or "the engine has not been ready yet")


def _answer(yes: bool, reason: str | None) -> Response:
    if yes:
        return json_response({"status": "ok", "reason": None})
    return json_response({"status": "unavailable", "reason": reason or "not ready"}, 503)
