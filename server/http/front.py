"""The outermost layer of an HTTP application: names and logs each request, guards browsers, and adds the headers of CORS.

It wraps everything, so errors, refusals, streams and answers to bugs have the headers too. Its part in sending one event of a
stream is one function call.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit

import orjson
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import error_object
from server.service.call_log import REQUEST_ID, CallRecord
from server.settings import Settings

IGNORED_FIELDS = b"x-tidegate-ignored-fields"
CALL = "tidegate.call"  # key of the request's CallRecord in the ASGI scope
_EXPOSED = ["x-request-id", "x-tidegate-ignored-fields", "retry-after"]


def call_of(scope: Any) -> CallRecord:
    """Return the record of the request with this ASGI scope."""
    call: CallRecord = scope[CALL]
    return call


class Front:
    """An ASGI application around `app`. `host` is the address that the port listens on."""

    def __init__(self, app: ASGIApp, settings: Settings, host: str) -> None:
        self._app = _with_cors(app, settings.cors_origins) if settings.cors_origins else app
        self._origins = frozenset(settings.cors_origins)
        self._hosts = frozenset(name.lower() for name in settings.allowed_hosts)
        self._checks_host = bool(self._hosts) or _is_local(host)
        self._writes_log = settings.log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id")
        call = CallRecord(None if given is None else given.encode("latin-1"), scope["method"])
        scope[CALL] = call
        _drop_last_slash(scope)

        def named_send(message: Message) -> Any:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_headers_of(call)]
            return send(message)

        try:
            app = self._app if self._may_enter(headers) else _foreign_host
            await app(scope, receive, named_send)
        finally:
            if self._writes_log:
                route = scope.get("route")
                call.route = f"{scope['method']} {getattr(route, 'path', '-')}"
                call.write()

    def _may_enter(self, headers: Headers) -> bool:
        """Return whether the request is of no browser, or of a page that may use this server.

        A page of a foreign site can get a name of its own that leads to this machine's address (DNS rebinding). To the browser,
        page and server are then of one origin, so it sends JSON without asking. The Host header shows that foreign name.
        """
        origin = headers.get("origin")
        if not self._checks_host or (origin is None and "sec-fetch-site" not in headers):
            return True
        if origin is not None and ("*" in self._origins or origin in self._origins):
            return True
        host = _name_in(headers.get("host", ""))
        return _is_own_name(host) or host in self._hosts


def _headers_of(call: CallRecord) -> list[tuple[bytes, bytes]]:
    named = (REQUEST_ID, call.id.encode())
    return [named, (IGNORED_FIELDS, ", ".join(call.ignored).encode())] if call.ignored else [named]


def _drop_last_slash(scope: Scope) -> None:
    """Let `/v1/models/` mean `/v1/models`. A redirect, as other servers answer it, would make many clients drop their body."""
    path: str = scope["path"]
    if len(path) > 1 and path.endswith("/") and not path.endswith("//"):
        scope["path"] = path[:-1]


def _name_in(host: str) -> str:
    """Return the name in a Host header, without its port; "" if there is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # raised for "[" without an address
        return ""


def _is_local(host: str) -> bool:
    """Return whether only this machine can reach the addresses of `host`, which may be a name or any spelling of an address."""
    try:
        addresses = [ipaddress.ip_address(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except (OSError, ValueError):
        return False
    return all((getattr(address, "ipv4_mapped", None) or address).is_loopback for address in addresses)


def _is_own_name(host: str) -> bool:
    """Return whether a foreign site can surely not have the name `host`: an address, a name below localhost, or a name without a
    dot, such as localhost itself, which nobody can register."""
    if host.endswith(".localhost") or (host and not {".", ":"} & set(host)):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def _foreign_host(scope: Scope, receive: Receive, send: Send) -> None:
    message = (
        "a browser sent this request for a host name that is not this server's: use localhost or an address, or add the name to "
        "the server's setting allowed_hosts"
    )
    body = orjson.dumps(error_object("permission_error", "host_not_allowed", message, "host"))
    await Response(body, 403, media_type="application/json")(scope, receive, send)


class _Cors(CORSMiddleware):
    """Starlette's middleware, with an error body like all others where a preflight request is refused."""

    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code == 200:
            return answer
        message = "the server's setting cors_origins does not have this origin, or no route has this method"
        answer.body = orjson.dumps(error_object("permission_error", "origin_not_allowed", message, "origin"))
        headers = {name: value for name, value in answer.headers.items() if name not in ("content-length", "content-type")}
        return Response(answer.body, answer.status_code, headers, "application/json")


def _with_cors(app: ASGIApp, origins: tuple[str, ...]) -> ASGIApp:
    """Wrap `app` so that pages of `origins` may use it. "*" stands for all origins."""
    return _Cors(
        app,
        allow_origins=origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=("*",),
        allow_private_network=True,
        expose_headers=_EXPOSED,
    )
