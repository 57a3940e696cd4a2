"""Builds the application of the HTTP port: its routes, the answer to each error, and the OpenAPI document.

There is no /docs page, because FastAPI's page loads scripts from other hosts. Any viewer can read /openapi.json.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from engine.errors import TidegateError
from server.errors import code_of, error_body, error_headers, error_object, status_of
from server.http.front import Front, call_of
from server.http.openapi import openapi_document
from server.http.routes import chat, completions, generate, health, models, tokenize, version
from server.http.routes import metrics as metrics_route
from server.http.routes.api import Api
from server.metrics.registry import Metrics
from server.service.service import GenerateService
from server.settings import Settings

log = logging.getLogger("tidegate.http")

SERVICE_ROUTERS = (health.router, metrics_route.router, version.router)
ROUTERS = (generate.router, completions.router, chat.router, models.router, tokenize.router, *SERVICE_ROUTERS)


def build_app(settings: Settings, service: GenerateService, metrics: Metrics) -> FastAPI:
    front = partial(Front, settings=settings, host=settings.host)
    api = Api.from_settings(settings, service, metrics)
    return application("Tidegate", "An inference server for large language models.", ROUTERS, api, front)


class _Application(FastAPI):
    """A FastAPI application inside a Front. Middleware that is added in FastAPI's way would not see the answers to bugs.

    The OpenAPI document is built when it is first asked for, so that the start of a server does not take that time.
    """

    front: Callable[[ASGIApp], ASGIApp]
    routers: Sequence[APIRouter]

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = openapi_document(self, self.routers)
        return self.openapi_schema

    def build_middleware_stack(self) -> ASGIApp:
        return self.front(super().build_middleware_stack())


def application(title: str, summary: str, routers: Sequence[APIRouter], api: Api, front: Callable[[ASGIApp], ASGIApp]) -> FastAPI:
    """Build a FastAPI application with the routes of `routers`. It answers errors with the JSON bodies of `server.errors`.

    `front` makes the outermost layer.
    """
    app = _Application(title=title, summary=summary, version=version.VERSION, openapi_url=None, redirect_slashes=False)
    app.front = front
    app.routers = routers
    app.state.api = api
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(TidegateError, _on_tidegate_error)
    app.add_exception_handler(HTTPException, _on_no_route)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _on_bug)
    app.add_route("/openapi.json", _openapi, include_in_schema=False)
    return app


async def _openapi(request: Request) -> Response:
    """Answers with the OpenAPI document. A thread builds it: that takes a tenth of a second, in which streams must go on."""
    return JSONResponse(await asyncio.to_thread(request.app.openapi))


async def _on_tidegate_error(request: Request, error: Exception) -> Response:
    status = status_of(error).http
    call = call_of(request.scope)
    call.code = code_of(error)
    if status == 500:
        log.error("%s %s failed: %r", request.method, request.scope["path"], error, exc_info=error, extra={"id": call.id})
    return Response(error_body(error), status, error_headers(error), "application/json")


async def _on_bug(request: Request, error: Exception) -> Response:
    """Answers an exception that is not a TidegateError with 500. Starlette raises it again afterwards, and uvicorn logs it."""
    call_of(request.scope).code = code_of(error)
    return Response(error_body(error), 500, media_type="application/json")


async def _on_no_route(request: Request, error: HTTPException) -> Response:
    """Answers a request whose path has no route (404) or whose route does not have the method (405)."""
    path = request.scope["path"][:256]
    if error.status_code == 405:
        body = error_object("invalid_request_error", "method_not_allowed", f"{path} does not support {request.method}")
    elif error.status_code == 404:
        body = error_object("not_found_error", "unknown_route", f"there is no {path}: /openapi.json lists what there is")
    else:
        body = error_object("invalid_request_error", "http_error", str(error.detail))
    return Response(orjson.dumps(body), error.status_code, error.headers, "application/json")
