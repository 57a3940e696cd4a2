"""Serves GET /version, which answers the server's version."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from server import __version__
from server.http.routes.api import json_response
from server.http.schemas.service import Version

router = APIRouter(tags=["service"])
VERSION = __version__


@router.get("/version", responses={200: {"model": Version}})
async def version() -> Response:
    """The server's version."""
    return json_response({"version": VERSION})
