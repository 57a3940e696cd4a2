"""What differs between HTTP/1.1 and older or newer versions, and how a request that asks for another protocol is read.

uvicorn answers every version as HTTP/1.1, and its parser drops the body of a request with an Upgrade header. The functions here
make `server.http.guard` refuse what it cannot answer, end the answers to HTTP/1.0 with the connection, and ignore upgrades.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from engine.errors import MalformedRequest

Headers = Sequence[tuple[bytes, bytes]]


class Refusal(NamedTuple):
    status: int
    code: str
    message: str


NO_VERSION = Refusal(400, MalformedRequest.code, "the request line has no HTTP version: it must end with HTTP/1.1")
_OTHER_VERSION = Refusal(505, "http_version_not_supported", "this server speaks HTTP/1.1 and HTTP/1.0")
_OTHER_CODING = Refusal(
    501, "transfer_coding_not_supported", "transfer-encoding may only be chunked: send the body without compression"
)
_CODING_IN_1_0 = Refusal(400, MalformedRequest.code, "HTTP/1.0 has no transfer-encoding: send a content-length")
_HOSTS = Refusal(400, MalformedRequest.code, "the request must have one Host header")


def fault_of(version: str, headers: Headers) -> Refusal | None:
    """Return why a request with this version and these headers must be refused, or None."""
    if version not in ("1.1", "1.0"):
        return NO_VERSION if version == "0.9" else _OTHER_VERSION
    num_hosts = sum(name == b"host" for name, _ in headers)
    if num_hosts > 1 or (num_hosts == 0 and version == "1.1"):
        return _HOSTS
    codings = [coding.strip().lower() for name, value in headers if name == b"transfer-encoding" for coding in value.split(b",")]
    if codings and version == "1.0":
        return _CODING_IN_1_0
    # The parser itself refuses codings that do not end with a single `chunked`.
    return _OTHER_CODING if any(coding not in (b"chunked", b"") for coding in codings) else None


def has_no_version(data: bytes) -> bool:
    """Return whether `data` begins with a whole request line that names no HTTP version. The parser would wait for headers, which
    such a client does not send."""
    line, end, _ = data.lstrip(b"\r\n").partition(b"\n")
    return bool(end) and b" HTTP/" not in line


def head_without_upgrade(method: bytes, url: bytes, version: str, headers: Headers) -> bytes:
    """Return the head of a request as a client would have sent it that does not ask for another protocol (RFC 9110, 7.8)."""
    lines = [b"%b: %b\r\n" % header for header in headers if header[0] != b"upgrade"]
    return b"%b %b HTTP/%b\r\n%b\r\n" % (method, url, version.encode(), b"".join(lines))


def until_close(app: Any, cycle: RequestResponseCycle) -> Any:
    """Return `app` for a request of HTTP/1.0. Its answer has no chunks: an answer of unknown length ends with the connection.

    uvicorn would send chunks, and `100 Continue`; HTTP/1.0 knows neither.
    """
    cycle.waiting_for_100_continue = False

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        has_length = True

        async def plain_send(message: Message) -> None:
            nonlocal has_length
            if message["type"] == "http.response.start":
                has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not has_length:  # these two attributes say: no chunks, and each piece has the length that is expected
                cycle.chunked_encoding = False
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, plain_send)

    return answer
