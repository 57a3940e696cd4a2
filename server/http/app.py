"""The HTTP application: routes, what each error becomes, and the OpenAPI document. No middleware.

There is no /docs page: FastAPI's loads its scripts from elsewhere. /openapi.json is what any viewer needs.
"""

from __future__ import annotations

import logging
from typing import Any

import orjson
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from engine.errors import TidegateError
from server.errors import error_body, error_headers, error_object, status_of
from server.http.openapi import openapi_document
from server.http.routes import chat, completions, generate, health, models, tokenize, version
from server.http.routes import metrics as metrics_route
from server.http.routes.api import Api
from server.metrics.registry import Metrics
from server.service.service import GenerateService
from server.settings import Settings

log = logging.getLogger("tidegate.http")
ROUTERS = (generate, completions, chat, models, tokenize, health, metrics_route, version)


def build_app(settings: Settings, service: GenerateService, metrics: Metrics) -> FastAPI:
    app = FastAPI(
        title="Tidegate",
        summary="An inference server for large language models.",
        version=version.VERSION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.api = Api(service=service, metrics=metrics, max_body_bytes=settings.max_body_bytes)
    for module in ROUTERS:
        app.include_router(module.router)
    app.add_exception_handler(TidegateError, _on_our_error)
    app.add_exception_handler(HTTPException, _on_no_route)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _on_bug)
    document: dict[str, Any] = openapi_document(app, [module.router for module in ROUTERS])
    app.openapi = lambda: document  # type: ignore[method-assign]
    return app


async def _on_our_error(request: Request, error: Exception) -> Response:
    status = status_of(error).http
    if status == 500:
        log.error("%s %s failed: %r", request.method, request.scope["path"], error, exc_info=error)
    return Response(error_body(error), status, error_headers(error), "application/json")


async def _on_bug(request: Request, error: Exception) -> Response:
    """Starlette raises it again once this is sent, and uvicorn logs it."""
    return Response(error_body(error), 500, media_type="application/json")


async def _on_no_route(request: Request, error: HTTPException) -> Response:
    """404 and 405 of the router."""
    path = request.scope["path"]
    if error.status_code == 405:
        body = error_object("invalid_request_error", "method_not_allowed", f"{request.method} is not for {path[:256]}")
    elif error.status_code == 404:
        body = error_object("not_found_error", "unknown_route", f"there is no {path[:256]} here: see /openapi.json")
    else:
        body = error_object("invalid_request_error", "http_error", str(error.detail))
    return Response(orjson.dumps(body), error.status_code, error.headers, "application/json")
