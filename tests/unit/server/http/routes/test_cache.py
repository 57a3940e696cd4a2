"""Tests POST /cache/reset of the admin port."""

import pytest

from engine.errors import EngineUnavailable
from server.http.admin import build_admin_app
from server.metrics.registry import Metrics
from server.settings import Settings
from tests.unit.server.http.routes.scripted import ScriptedService
from tests.unit.server.http.routes.serve import client_for

PATH = "/cache/reset"
ALL = ["gpu", "host", "disk"]


class WithCache(ScriptedService):
    def __init__(self):
        super().__init__()
        self.resets = []

    async def reset_cache(self, tiers):
        self.resets.append(list(tiers))
        if len(self.resets) > 1:
            raise EngineUnavailable("engine 1 was lost")
        return dict.fromkeys(tiers, 5)


def admin(service):
    return client_for(build_admin_app(Settings(), service, Metrics("tiny", service.health)))


@pytest.mark.parametrize(
    ("body", "tiers"),
    [(b"", ALL), (b"{}", ALL), (b'{"tiers": null}', ALL), (b'{"tiers": ["host"]}', ["host"])],
)
async def test_the_tiers_that_are_named_or_all_are_reset(body, tiers):
    service = WithCache()
    async with admin(service) as client:
        answer = await client.post(PATH, content=body)
        assert (answer.status_code, answer.json()) == (200, {"forgotten_blocks": dict.fromkeys(tiers, 5)})
        failed = await client.post(PATH, content=body)
    assert (failed.status_code, failed.json()["error"]["message"]) == (503, "engine 1 was lost")
    assert service.resets == [tiers, tiers]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (b'{"tiers": ["gpu", "tape"]}', "tiers[1]", "must be 'gpu', 'host' or 'disk'"),
        (b'{"tiers": []}', "tiers", "must not be empty"),
        (b'{"tier": "gpu"}', "tier", "is not a field of this request"),
    ],
)
async def test_a_wrong_body_is_refused_and_nothing_is_reset(body, param, says):
    service = WithCache()
    async with admin(service) as client:
        error = (await client.post(PATH, content=body)).json()["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert service.resets == []


async def test_a_web_page_cannot_reset_the_cache():
    service = WithCache()
    async with admin(service) as client:
        assert (await client.post(PATH, headers={"origin": "http://page.example"})).status_code in (403, 415)
    assert service.resets == []
