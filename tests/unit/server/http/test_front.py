"""Tests what every HTTP request gets whatever its route: an id, a log line, CORS headers, and the check of browsers."""

import logging

import pytest

from engine.errors import ContextTooLong, EngineUnavailable
from engine.request import CachedTokens
from server.http.app import build_app
from server.http.limits import HttpLimits
from server.metrics.registry import Metrics
from server.service.types import Chunk
from server.settings import Settings
from tests.support.http_server import serving
from tests.unit.server.http.routes.scripted import ScriptedService, letters
from tests.unit.server.http.routes.serve import client_of

GENERATE = {"prompt": "x"}
PAGE = "https://page.example"


async def send(service, path="/v1/generate", body=GENERATE, headers=None, method="POST", base="http://test", **settings):
    async with client_of(service, **settings) as client:
        client.base_url = base
        return await client.request(method, path, json=body if method == "POST" else None, headers=headers or {})


def logged(caplog):
    return [record for record in caplog.records if record.name == "tidegate.requests"]


# -- ids ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_the_clients_request_id_is_repeated(stream):
    answer = await send(
        ScriptedService(*letters("ab")), body={**GENERATE, "stream": stream}, headers={"x-request-id": "a/b:1=+@-_."}
    )
    assert answer.headers.get_list("x-request-id") == ["a/b:1=+@-_."]


@pytest.mark.parametrize("given", [None, "", "a b", "a" * 129, "é", "a,b", "<x>"])
async def test_a_request_without_a_usable_id_gets_that_of_its_answer(given):
    headers = {} if given is None else {"x-request-id": given.encode()}
    answer = await send(ScriptedService(*letters("a")), headers=headers)
    assert answer.headers["x-request-id"] == answer.json()["id"]


async def test_the_requests_own_field_request_id_does_not_name_the_http_request():
    """The field is repeated in the body of the answer, and the header in the header: neither replaces the other."""
    body = {**GENERATE, "request_id": "order-7"}
    answer = await send(ScriptedService(*letters("a")), body=body, headers={"x-request-id": "trace-1"})
    assert (answer.headers["x-request-id"], answer.json()["request_id"]) == ("trace-1", "order-7")
    answer = await send(ScriptedService(*letters("a")), body=body)
    assert answer.headers["x-request-id"] == answer.json()["id"] != "order-7"


class Broken(ScriptedService):
    def models(self):
        raise KeyError("bug")


@pytest.mark.parametrize(
    ("service", "method", "path", "status"),
    [
        (ScriptedService(EngineUnavailable("gone")), "POST", "/v1/generate", 503),
        (ScriptedService(), "GET", "/nowhere", 404),
        (ScriptedService(), "GET", "/v1/generate", 405),
        (Broken(), "GET", "/v1/models", 500),
        (ScriptedService(), "HEAD", "/health", 200),
    ],
)
async def test_every_answer_has_a_request_id(service, method, path, status):
    for given, begins in ({}, ("req-", "gen-")), ({"x-request-id": "mine"}, "mine"):
        answer = await send(service, path, method=method, headers=given)
        assert answer.status_code == status
        assert answer.headers["x-request-id"].startswith(begins)


def test_a_refusal_before_the_routes_has_the_clients_request_id():
    import socket

    app = build_app(Settings(), ScriptedService(), Metrics("tiny", ScriptedService().health))
    with (
        serving(app, HttpLimits.from_settings(Settings())) as port,
        socket.create_connection(("127.0.0.1", port), 5) as client,
    ):
        client.sendall(b"POST /v1/generate HTTP/1.1\r\nhost: x\r\nX-Request-ID: mine\r\ntransfer-encoding: gzip, chunked\r\n\r\n")
        answer = client.recv(4096)
    assert answer.startswith(b"HTTP/1.1 501 ")
    assert b"\r\nx-request-id: mine\r\n" in answer


# -- the log -----------------------------------------------------------------------------------------------------------


class Measured(ScriptedService):
    """A service that reports what each request has used so far, as the real one does."""

    async def generate(self, request, identity, *, transport="http"):
        progress = request.progress
        progress.prompt_tokens, progress.cached, progress.queue_s, progress.ttft_s = 7, CachedTokens(gpu=3, host=1), 0.001, 0.002
        async for item in super().generate(request, identity, transport=transport):
            if isinstance(item, Chunk):
                progress.completion_tokens += len(item.token_ids)
            yield item


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_one_log_line_without_its_text(caplog, stream):
    caplog.set_level(logging.INFO, "tidegate")
    body = {"prompt": ["secret one", "secret two"], "stream": stream}
    answer = await send(Measured(*letters("tide")), "/v1/completions", body, {"x-request-id": "mine"})
    assert answer.status_code == 200
    (line,) = logged(caplog)
    assert (line.id, line.route, line.status) == ("mine", "POST /v1/completions", 200)
    assert line.answer.startswith("cmpl-")
    assert (line.prompt_tokens, line.cached_tokens, line.completion_tokens) == (14, 8, 8)
    assert line.total_ms >= 0
    assert (line.queue_ms, line.ttft_ms) == (1.0, 2.0)
    assert "secret" not in str(vars(line))


@pytest.mark.parametrize(
    ("service", "method", "path", "status", "code"),
    [
        (ScriptedService(ContextTooLong("long")), "POST", "/v1/generate", 400, "context_length_exceeded"),
        (ScriptedService(KeyError("secret")), "POST", "/v1/generate", 500, "internal_error"),
        (ScriptedService(), "GET", "/secret/path?key=secret", 404, None),
        (ScriptedService(Chunk(index=0, text="a", token_ids=[1]), EngineUnavailable("gone")), "STREAM", "/v1/generate", 200, "x"),
    ],
)
async def test_the_log_line_of_a_failed_request_has_its_code_and_no_path_of_the_client(
    caplog, service, method, path, status, code
):
    caplog.set_level(logging.INFO, "tidegate")
    if method == "STREAM":
        method, body, code = "POST", {**GENERATE, "stream": True}, "engine_unavailable"
    else:
        body = GENERATE
    await send(service, path, body, method=method)
    (line,) = logged(caplog)
    assert (line.status, getattr(line, "code", None)) == (status, code)
    assert "secret" not in str({key: value for key, value in vars(line).items() if key not in ("exc_info",)})


async def test_probes_are_logged_as_debug_and_the_setting_switches_all_lines_off(caplog):
    caplog.set_level(logging.DEBUG, "tidegate")
    for path in ("/health", "/health/live", "/ping", "/metrics"):
        await send(ScriptedService(), path, method="GET")
    assert [line.levelno for line in logged(caplog)] == [logging.DEBUG] * 4
    await send(ScriptedService(*letters("a")), log_requests=False)
    assert len(logged(caplog)) == 4


# -- CORS --------------------------------------------------------------------------------------------------------------

PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


async def test_no_origin_may_read_answers_by_default():
    answer = await send(ScriptedService(*letters("a")), headers={"origin": PAGE}, base="http://127.0.0.1")
    assert "access-control-allow-origin" not in answer.headers
    assert (await send(ScriptedService(), headers=PREFLIGHT, method="OPTIONS", base="http://127.0.0.1")).status_code == 405


@pytest.mark.parametrize("origins", [[PAGE], ["https://other.example", PAGE], ["*"]])
async def test_listed_origins_may_read_answers_streams_and_errors(origins):
    allowed = "*" if origins == ["*"] else PAGE
    service = ScriptedService(*letters("ab"))
    asked = await send(service, headers=PREFLIGHT, method="OPTIONS", cors_origins=origins)
    assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, allowed)
    assert "x-stainless-os" in asked.headers["access-control-allow-headers"]
    cases = [(GENERATE, 200), ({**GENERATE, "stream": True}, 200), ({}, 400)]
    for body, status in cases:
        answer = await send(service, body=body, headers={"origin": PAGE}, cors_origins=origins)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, allowed)
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
    broken = await send(Broken(), "/v1/models", method="GET", headers={"origin": PAGE}, cors_origins=origins)
    assert (broken.status_code, broken.headers["access-control-allow-origin"]) == (500, allowed)


async def test_an_origin_that_is_not_listed_is_refused_in_our_words():
    asked = await send(
        ScriptedService(), headers={**PREFLIGHT, "origin": "https://evil.example"}, method="OPTIONS", cors_origins=[PAGE]
    )
    assert asked.status_code == 400
    assert asked.json()["error"]["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in asked.headers
    answer = await send(
        ScriptedService(*letters("a")), headers={"origin": "https://evil.example"}, base="http://127.0.0.1", cors_origins=[PAGE]
    )
    assert "access-control-allow-origin" not in answer.headers


# -- pages that reach a local server under a name of their own -------------------------------------------------------------

REBOUND = {"origin": "http://evil.example:8000", "host": "evil.example:8000"}


@pytest.mark.parametrize(
    ("headers", "settings", "status"),
    [
        (REBOUND, {}, 403),
        ({"sec-fetch-site": "same-origin", "host": "evil.example"}, {}, 403),
        ({"origin": "http://localhost.evil.example", "host": "localhost.evil.example"}, {}, 403),
        ({"origin": "http://x", "host": "[x"}, {}, 403),
        ({"host": "evil.example:8000"}, {}, 200),
        ({"origin": "http://localhost:8000", "host": "localhost:8000"}, {}, 200),
        ({"origin": "http://gpu-box:8000", "host": "gpu-box:8000"}, {}, 200),
        ({"origin": "http://app.localhost:8000", "host": "app.localhost:8000"}, {}, 200),
        ({"origin": "http://127.0.0.1:8000", "host": "127.0.0.1:8000"}, {}, 200),
        ({"origin": "http://[::1]:8000", "host": "[::1]:8000"}, {}, 200),
        (REBOUND, {"host": "0.0.0.0"}, 200),
        (REBOUND, {"host": "0.0.0.0", "allowed_hosts": ["api.example"]}, 403),
        (REBOUND, {"allowed_hosts": ["api.example", "Evil.example"]}, 200),
        (REBOUND, {"cors_origins": ["http://evil.example:8000"]}, 200),
        (REBOUND, {"host": "localhost"}, 403),
        (REBOUND, {"host": "::1"}, 403),
        (REBOUND, {"host": "127.1"}, 403),
        (REBOUND, {"host": "127.0.1.1"}, 403),
        (REBOUND, {"host": "::ffff:127.0.0.1"}, 403),
        (REBOUND, {"host": "::"}, 200),
        (REBOUND, {"host": "no address"}, 200),
    ],
)
async def test_a_page_under_a_foreign_name_is_refused_if_the_server_is_local(headers, settings, status):
    service = ScriptedService(*letters("a"))
    answer = await send(service, headers=headers, **settings)
    assert answer.status_code == status
    assert len(service.requests) == (status == 200)
    if status == 403:
        assert answer.json()["error"]["code"] == "host_not_allowed"
        assert "allowed_hosts" in answer.json()["error"]["message"]


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/", "/health/", "/health/ready/", "/ping/", "/version/", "/metrics/"])
async def test_a_slash_at_the_end_of_a_path_changes_nothing(path):
    assert (await send(ScriptedService(), path, method="GET")).status_code == 200


@pytest.mark.parametrize("path", ["/v1/generate/", "/v1/completions/"])
async def test_a_slash_at_the_end_of_a_path_does_not_lose_the_body(path):
    assert (await send(ScriptedService(*letters("a")), path)).status_code == 200


@pytest.mark.parametrize(("ready", "status"), [(True, 200), (False, 503)])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", ["/health", "/ping"])
async def test_health_and_ping_answer_as_ready(path, method, ready, status):
    answer = await send(ScriptedService(ready=ready), path, method=method)
    assert answer.status_code == status
    assert bool(answer.content) == (method == "GET")
