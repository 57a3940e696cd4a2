"""Provides clients of a real server and readers of its metrics, for tests that kill or stop the server."""

import asyncio
import json
import os
import socket
import subprocess
import sys

import httpx

from tests.support import plain_http
from tests.support.children import ROOT, after


def body(number, max_tokens=100, **changes):
    prompt = [5 + (number * 7 + i) % 200 for i in range(20 + number)]
    return {"prompt_token_ids": prompt, "max_tokens": max_tokens, "temperature": 0, "seed": number, "ignore_eos": True, **changes}


def http(server):
    return plain_http.AsyncClient(base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=200))


async def stream_tokens(client, number, max_tokens=100, first=None):
    """Return the token ids of one SSE stream, or the error that ended it. The event `first` is set when a token arrives."""
    tokens, done = [], False
    async with client.stream("POST", "/v1/generate", json=body(number, max_tokens, stream=True)) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    return event["error"]
                tokens += event.get("token_ids", [])
                if first is not None:
                    first.set()
    assert done
    return tokens


def metrics(server):
    lines = plain_http.get(server.url + "/metrics").text.splitlines()
    values = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            values[name.partition("{")[0]] = values.get(name.partition("{")[0], 0.0) + float(value)
    return values


def used_blocks(server):
    return metrics(server).get("tidegate_kv_cache_usage_ratio")  # the metric is missing (None) until the engine's first heartbeat


def engine_running(server):
    return metrics(server).get("tidegate_engine_requests_running")


async def in_thread(function, *args, **kwargs):
    return await asyncio.to_thread(function, *args, **kwargs)


def refused(port):
    """Return whether the port refuses connections. Just before a server closes a port, the kernel drops those who connect."""
    try:
        socket.create_connection(("127.0.0.1", port), 0.2).close()
    except ConnectionRefusedError:
        return True
    except TimeoutError:
        pass
    return False


def refused_start(variables, shell=":"):
    """Run `tidegate serve`, which must refuse to start with exit code 2. The shell code `shell` runs first in the server's
    process."""
    ports = {f"TIDEGATE_{name}": "0" for name in ("PORT", "GRPC_PORT", "ADMIN_PORT")}
    environment = {**os.environ, **ports, "TIDEGATE_RUNNER": "fake", **variables}
    command = after(shell, [sys.executable, "-m", "server.cli", "serve"])
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=40, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "ended badly" not in done.stderr
    return done
