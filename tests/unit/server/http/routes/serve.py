"""Sends requests to an HTTP application over a scripted service, within the test's process and event loop."""

from __future__ import annotations

import json

import httpx

from server.http.app import build_app
from server.metrics.registry import Metrics
from server.settings import Settings


def app_of(service, **settings):
    return build_app(Settings(**settings), service, Metrics("tiny", service.health))


def client_of(service, **settings):
    return client_for(app_of(service, **settings))


def client_for(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test")


async def post(service, path, body):
    async with client_of(service) as client:
        response = await client.post(path, json=body)
    return response.status_code, response.json()


async def events_of(service, path, body):
    """Post `body` with `stream` set, and return the events of the answer with their JSON decoded. The last event is the text
    "[DONE]"."""
    async with client_of(service) as client:
        response = await client.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\n\n")
    assert frames.pop() == ""
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    return [data if (data := frame[6:]) == "[DONE]" else json.loads(data) for frame in frames]
