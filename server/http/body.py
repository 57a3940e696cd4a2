"""Reads the body of an HTTP request as JSON and validates it.

Content types of JSON are read, and a charset with them is ignored, since JSON is UTF-8. A web page may send text/plain, a form,
or no type at all to any server without asking it, and could so make a local server generate. These are refused, with one
exception: `curl -d '{...}'` names the type of a form, and many clients name none. Both are read from clients that send neither
Origin nor Sec-Fetch-Site, which a browser adds to every such request and a page cannot remove.

The bytes are counted while they arrive, so the limit also holds for a wrong or missing content-length. A thread parses large
bodies, so that the event loop can go on sending other clients' tokens.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from engine.errors import Aborted, MalformedRequest, PayloadTooLarge, UnsupportedMediaType
from server.errors import from_validation
from server.http import strict_json
from server.http.front import call_of
from server.http.routes.api import Api
from server.http.schemas.fields import Ignored

M = TypeVar("M", bound=BaseModel)

# A thread parses bodies of at least this size; parsing this much takes about a millisecond. From this size on, `strict_json`
# decodes in slices, since a thread holds the interpreter lock for as long as one C call takes.
THREAD_BYTES = strict_json.SLICED_BYTES
# All large bodies share one thread, so that the event loop competes with one at most, however many bodies arrive together.
_PARSER = ThreadPoolExecutor(1, "tidegate-body")


async def read_json(request: Request, model: type[M], api: Api, *, optional: bool = False) -> M:
    """Read and validate the body of `request`. Returns an instance of `model`.

    An empty body is an error, or, if it is `optional`, stands for an object without fields.
    Raises UnsupportedMediaType, MalformedRequest (not a JSON object), InvalidRequest (a field is wrong), PayloadTooLarge, or
    Aborted (the client left). Without `api.strict_fields`, unknown fields are noted in the request's record.
    """
    _check_type(request)
    _check_encoding(request)
    body = await read_body(request, api.max_body_bytes)
    if optional and not body:
        body = b"{}"
    ignored = None if api.strict_fields else Ignored()
    if len(body) < THREAD_BYTES:
        parsed = _parse(body, model, ignored)
    else:
        parsed = await asyncio.get_running_loop().run_in_executor(_PARSER, _parse, body, model, ignored)
    if ignored is not None:
        call_of(request.scope).ignored = ignored.names
    return parsed


def _check_type(request: Request) -> None:
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return
    from_browser = "origin" in request.headers or "sec-fetch-site" in request.headers
    if kind in ("", "application/x-www-form-urlencoded") and not from_browser:
        return
    what = f"content-type is {given[:64]!r}" if kind else "there is no content-type"
    raise UnsupportedMediaType(f"{what}: send the body as application/json", param="content-type")


def _check_encoding(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "")
    if encoding.strip().lower() not in ("", "identity"):
        raise MalformedRequest(
            f"content-encoding is {encoding[:32]!r}: send the body without compression",
            param="content-encoding",
        )


def _parse(body: bytes, model: type[M], ignored: Ignored | None) -> M:
    if not body:
        raise MalformedRequest("the body is empty: it must be a JSON object")
    value = strict_json.loads(body)
    if not isinstance(value, dict):
        raise MalformedRequest("the body must be a JSON object")
    try:
        return model.model_validate(value, context=ignored)
    except ValidationError as error:
        raise from_validation(error) from None


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read the bytes of the body of `request`. Raises PayloadTooLarge as soon as more than `max_bytes` have arrived."""
    too_large = PayloadTooLarge(f"the body is larger than this server's limit of {max_bytes} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > max_bytes):
        raise too_large
    parts: list[bytes] = []
    num_bytes = 0
    try:
        async for part in request.stream():
            num_bytes += len(part)
            if num_bytes > max_bytes:
                raise too_large
            parts.append(part)
    except ClientDisconnect:
        raise Aborted("the client left before its request was complete") from None
    return parts[0] if len(parts) == 1 else b"".join(parts)
