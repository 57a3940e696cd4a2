"""Sends requests over HTTP: Tidegate's own route, or OpenAI's completions and chat of any server."""

from __future__ import annotations

import urllib.parse
from typing import Any

import orjson

from loadtest.clients.base import Call
from loadtest.clients.events import READERS, EventReader
from loadtest.clients.http1 import Pool, Response
from loadtest.prompts import Prompt
from loadtest.record import Failure, Reading
from loadtest.spec import Load, Target

PATHS = {"generate": "/v1/generate", "completions": "/v1/completions", "chat": "/v1/chat/completions"}
_REFUSED = (429, 503)


class HttpClient:
    def __init__(self, target: Target, load: Load) -> None:
        self._url = target.url.rstrip("/") + PATHS[target.route]
        self._target, self._load = target, load
        self._pool = Pool(target.url)
        key = f"authorization: Bearer {target.api_key}\r\n" if target.api_key else ""
        path = urllib.parse.urlsplit(self._url).path
        self._head = (
            f"POST {path} HTTP/1.1\r\nhost: {self._pool.host_header}\r\n{key}"
            "content-type: application/json\r\naccept: text/event-stream\r\ncontent-length: "
        ).encode()

    async def stream(self, call: Call, reading: Reading) -> None:
        body = orjson.dumps(self._body(call), option=orjson.OPT_SERIALIZE_NUMPY)
        events = EventReader(READERS[self._target.route], reading)
        slow = self._load.slow_bytes if call.slow else None
        response = await self._pool.exchange(b"%b%d\r\n\r\n%b" % (self._head, len(body), body), events.feed, slow_bytes=slow)
        if response.status != 200:
            raise _failure(response)
        if not response.is_stream:
            kind = response.headers.get("content-type", "no content type")
            raise Failure("not a stream", f"{self._url} answered 200 with {kind} instead of text/event-stream")
        if not events.done:
            raise Failure("closed early", "the stream ended without [DONE]")

    async def close(self) -> None:
        self._pool.close()

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


def _prompt(route: str, prompt: Prompt) -> dict[str, Any]:
    if route == "chat":
        return {"messages": prompt.messages}
    if route == "generate":
        return {"prompt": prompt.text} if prompt.ids is None else {"prompt_token_ids": prompt.ids}
    return {"prompt": prompt.text if prompt.ids is None else prompt.ids}


def _failure(response: Response) -> Failure:
    """Return the failure of an answer that is no 200."""
    code, message = "", response.body[:200].decode(errors="replace")
    try:
        error = orjson.loads(response.body)["error"]
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
