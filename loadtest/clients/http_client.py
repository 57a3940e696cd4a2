"""Sends requests over HTTP: Tidegate's own route, or OpenAI's completions and chat of any server."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import AbstractAsyncContextManager
from typing import Any

import aiohttp
import orjson

from loadtest.clients.base import Call
from loadtest.clients.events import READERS, parse
from loadtest.prompts import Prompt
from loadtest.record import Failure, Reading
from loadtest.spec import Load, Target

PATHS = {"generate": "/v1/generate", "completions": "/v1/completions", "chat": "/v1/chat/completions"}
_REFUSED = (429, 503)
_KEEP_ALIVE = 4.0  # below the 5 s of uvicorn: a connection that the server has just closed must not be used again
_SLOW_BUFFER = 2048  # bytes of each buffer of a slow reader, so that the server notices soon that nobody reads


class HttpClient:
    def __init__(self, target: Target, load: Load) -> None:
        self._url = target.url.rstrip("/") + PATHS[target.route]
        self._target, self._load = target, load
        self._read = READERS[target.route]
        self._session = _session(target, aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE))
        self._slow_session = _session(target, aiohttp.TCPConnector(limit=0, force_close=True, socket_factory=_small_socket))

    async def stream(self, call: Call, reading: Reading) -> None:
        try:
            async with self._post(call) as response:
                if response.status != 200:
                    raise _failure(response, await response.read())
                if "text/event-stream" not in response.headers.get("content-type", ""):
                    kind = response.headers.get("content-type", "no content type")
                    raise Failure("not a stream", f"{self._url} answered 200 with {kind} instead of text/event-stream")
                await self._events(response, reading, slow=call.slow)
        except aiohttp.ClientConnectorError as error:
            raise Failure("no connection", str(error)) from None
        except aiohttp.ClientPayloadError as error:
            raise Failure("closed early", str(error)) from None
        except aiohttp.ClientError as error:
            raise Failure(type(error).__name__, str(error)) from None

    async def close(self) -> None:
        await self._session.close()
        await self._slow_session.close()

    def _post(self, call: Call) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        session = self._slow_session if call.slow else self._session
        return session.post(
            self._url,
            data=orjson.dumps(self._body(call), option=orjson.OPT_SERIALIZE_NUMPY),
            headers={"content-type": "application/json"},
            read_bufsize=_SLOW_BUFFER if call.slow else 1 << 16,
        )

    def _body(self, call: Call) -> dict[str, Any]:
        load = self._load
        body: dict[str, Any] = {"model": self._target.model, **_prompt(self._target.route, call.prompt)}
        body |= {"max_tokens": call.max_tokens, "temperature": load.temperature, "stream": True}
        if load.ignore_eos:
            body["ignore_eos"] = True
        if self._target.route != "generate":
            body["stream_options"] = {"include_usage": True}
        if call.slo_class is not None:
            body["slo_class"] = call.slo_class
        if load.deadline_ms is not None:
            body["deadline_ms"] = load.deadline_ms
        return body

    async def _events(self, response: aiohttp.ClientResponse, reading: Reading, *, slow: bool) -> None:
        """Read server-sent events until [DONE]. Raises Failure if the stream ends before it."""
        content, rest, done = response.content, b"", False
        while piece := await (content.read(_SLOW_BUFFER // 8) if slow else content.readany()):
            now = time.perf_counter()
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                payload = line[5:].strip()
                if payload == b"[DONE]":
                    done = True
                else:
                    self._read(parse(payload), now, reading)
            if slow:
                await asyncio.sleep(len(piece) / self._load.slow_bytes)
        if not done:
            raise Failure("closed early", "the stream ended without [DONE]")


def _session(target: Target, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
    headers = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)  # the driver has the deadline of the whole request
    return aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers)


def _small_socket(address: Any) -> socket.socket:
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_BUFFER)
    return made


def _prompt(route: str, prompt: Prompt) -> dict[str, Any]:
    if route == "chat":
        return {"messages": prompt.messages}
    if route == "generate":
        return {"prompt": prompt.text} if prompt.ids is None else {"prompt_token_ids": prompt.ids}
    return {"prompt": prompt.text if prompt.ids is None else prompt.ids}


def _failure(response: aiohttp.ClientResponse, body: bytes) -> Failure:
    """Return the failure of an answer that is no 200."""
    code, message = "", body[:200].decode(errors="replace")
    try:
        error = orjson.loads(body)["error"]
        code, message = str(error.get("code") or error.get("type") or ""), str(error["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        pass  # not every server answers in OpenAI's form; the text itself is the message
    after = response.headers.get("retry-after", "")
    return Failure(
        f"{response.status} {code}".strip(),
        message,
        refused=response.status in _REFUSED,
        retry_after=float(after) if after.isdigit() else None,
    )
