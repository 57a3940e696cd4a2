"""Tests the admin port of a real `tidegate serve`."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys

import pytest

from server.service.connections import ADMIN_CONNECTIONS
from tests.support import plain_http
from tests.support.children import ROOT, ServerChild, wait_until
from tests.support.serving import refused

BODY = {"prompt_token_ids": [5, 6, 7], "max_tokens": 5, "ignore_eos": True}


@pytest.fixture
def server():
    with ServerChild(api_workers=2) as child:
        yield child


def admin_url(server):
    return f"http://127.0.0.1:{server.admin_port}"


def listening_addresses(server):
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table][1:]
    listening = [row[1].split(":") for row in rows if row[3] == "0A"]
    return {(address, int(port, 16)) for address, port in listening}


def started_requests(server):
    lines = plain_http.get(admin_url(server) + "/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("tidegate_requests_started_total"))


def test_one_admin_port_serves_for_all_workers_and_on_the_loopback_address_alone(server):
    with plain_http.Client(base_url=admin_url(server)) as admin:
        for probe in ("live", "ready", "startup"):
            assert admin.get(f"/health/{probe}").status_code == 200
        assert admin.get("/version").json() == plain_http.get(server.url + "/version").json()
        assert admin.post("/v1/generate", json=BODY).status_code == 404
        assert "/v1/generate" not in admin.get("/openapi.json").json()["paths"]
    for _ in range(6):
        assert plain_http.post(server.url + "/v1/generate", json=BODY).status_code == 200
    assert started_requests(server) == 6
    assert ("0100007F", server.admin_port) in listening_addresses(server)
    assert ("00000000", server.admin_port) not in listening_addresses(server)


def test_the_admin_port_has_a_small_limit_of_connections_and_the_http_port_another():
    with ServerChild(max_connections=100) as server, contextlib.ExitStack() as open_sockets:
        for _ in range(ADMIN_CONNECTIONS):
            idle = socket.create_connection(("127.0.0.1", server.admin_port), 10)
            open_sockets.enter_context(idle)
        assert plain_http.get(admin_url(server) + "/health/live").status_code == 503
        assert plain_http.get(server.url + "/health/live").status_code == 200
        idle.close()
        wait_until(lambda: plain_http.get(admin_url(server) + "/health/live").status_code == 200, "a place is free again")


async def test_the_admin_port_answers_while_the_server_drains():
    with ServerChild(fake_step_ms=20, drain_timeout_s=30) as server:
        async with http_and_admin(server) as (client, admin), stream_of(client) as lines:
            assert (await anext(lines)).startswith("data: ")
            server.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(wait_until, lambda: refused(server.port), "the HTTP port is closed")
            ready = await admin.get("/health/ready")
            assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
            assert (await admin.get("/health/live")).status_code == 200
            assert 'tidegate_requests_running{transport="http"} 1.0' in (await admin.get("/metrics")).text
            assert [line async for line in lines if line][-1] == "data: [DONE]"
        assert await asyncio.to_thread(server.process.wait, 10) == 0
        assert refused(server.admin_port)


def tidegate(*arguments):
    return subprocess.run([sys.executable, "-m", "server.cli", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_that_resets_the_cache():
    body = {**BODY, "prompt_token_ids": [*range(2, 66)]}
    with ServerChild(api_workers=2, host_tier_bytes=1 << 20, block_size=16, fake_step_ms=0) as server:
        cached = [plain_http.post(server.url + "/v1/generate", json=body).json()["usage"]["cached_tokens"] for _ in range(2)]
        assert cached == [0, 48]
        reset = tidegate("cache", "reset", "--admin-url", admin_url(server))
        said = [f"{tier}: {blocks} blocks forgotten\n" for tier, blocks in (("gpu", 4), ("host", 0), ("disk", 0))]
        assert (reset.returncode, reset.stdout, reset.stderr) == (0, "".join(said), "")
        assert plain_http.post(server.url + "/v1/generate", json=body).json()["usage"]["cached_tokens"] == 0
        only = tidegate("cache", "reset", "--tier", "gpu", "--admin-url", admin_url(server) + "/")
        assert (only.returncode, only.stdout) == (0, "gpu: 4 blocks forgotten\n")
        assert [line["gpu_blocks"] for line in server.said("KV cache reset")] == [4, 4]
        refused = tidegate("cache", "reset", "--tier", "tape", "--admin-url", admin_url(server))
        assert refused.returncode == 1
        assert "tiers[0] must be" in refused.stderr
        wrong_port = tidegate("cache", "reset", "--admin-url", server.url)
        assert (wrong_port.returncode, "there is no /cache/reset" in wrong_port.stderr) == (1, True)
    gone = tidegate("cache", "reset", "--admin-url", admin_url(server))
    assert (gone.returncode, "no answer from" in gone.stderr) == (1, True)
    assert tidegate("cache", "reset", "--admin-url", "localhost").stderr.startswith("tidegate: localhost/cache/reset is no URL")


def test_a_reset_names_the_engine_that_has_died():
    """The engine stands still when it is asked, and is killed for that later."""
    with ServerChild(stall_timeout_s=3) as server:
        os.kill(server.children()["tidegate: engine 0"], signal.SIGSTOP)
        answer = plain_http.post(admin_url(server) + "/cache/reset", timeout=30)
        assert (answer.status_code, answer.json()["error"]["message"][:9]) == (503, "engine 0 ")


@contextlib.asynccontextmanager
async def http_and_admin(server):
    async with plain_http.AsyncClient(base_url=server.url) as client, plain_http.AsyncClient(base_url=admin_url(server)) as admin:
        yield client, admin


@contextlib.asynccontextmanager
async def stream_of(client):
    body = {**BODY, "max_tokens": 400, "stream": True}
    async with client.stream("POST", "/v1/generate", json=body, timeout=60) as response:
        yield response.aiter_lines()
