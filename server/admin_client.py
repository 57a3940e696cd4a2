"""Calls the admin port of a running server, for commands of `tidegate` that operators use."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Sequence

import msgspec

from engine.errors import EngineUnavailable, InvalidRequest, TidegateError

TIMEOUT_SECONDS = 600.0  # an engine answers between two steps; the server gives up earlier, after stall_timeout_s


class _ErrorDetail(msgspec.Struct):
    message: str


class _Error(msgspec.Struct):
    error: _ErrorDetail


class _Reset(msgspec.Struct):
    forgotten_blocks: dict[str, int]


def reset_cache(url: str, tiers: Sequence[str]) -> dict[str, int]:
    """Reset `tiers` of the KV cache, all if it is empty, of the server whose admin port is at `url`.

    Returns how many blocks each tier held. Raises InvalidRequest if `url` is none, EngineUnavailable if no server answers there,
    and TidegateError with the server's words if it refuses.
    """
    body = msgspec.json.encode({"tiers": tiers} if tiers else {})
    return msgspec.json.decode(_post(url.rstrip("/") + "/cache/reset", body), type=_Reset).forgotten_blocks


def _post(url: str, body: bytes) -> bytes:
    if not url.startswith(("http://", "https://")):
        raise InvalidRequest(f"{url} is no URL of an admin port: it must begin with http:// or https://", param="admin_url")
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # an admin port is not behind the proxy of a user
    try:
        with direct.open(request, timeout=TIMEOUT_SECONDS) as answer:
            read: bytes = answer.read()
            return read
    except urllib.error.HTTPError as error:
        raise TidegateError(_words(url, error)) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise EngineUnavailable(f"no answer from {url}: {reason}. Is this the address of a server's admin port?") from None


def _words(url: str, error: urllib.error.HTTPError) -> str:
    try:
        return msgspec.json.decode(error.read(), type=_Error).error.message
    except msgspec.MsgspecError:
        return f"{url} answers {error.code}: it is no admin port of Tidegate"
