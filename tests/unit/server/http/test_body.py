"""Tests which content types of a body are read. A web page must not be able to make a local server generate."""

import pytest

from tests.unit.server.http.routes.scripted import ScriptedService, letters
from tests.unit.server.http.routes.serve import app_of, client_for

ROUTES = {
    "/v1/generate": b'{"prompt": "\xc3\xa9"}',
    "/v1/completions": b'{"prompt": "\xc3\xa9"}',
    "/v1/chat/completions": b'{"messages": [{"role": "user", "content": "\xc3\xa9"}]}',
    "/tokenize": b'{"prompt": "\xc3\xa9"}',
    "/detokenize": b'{"tokens": [104]}',
}
FORM = "application/x-www-form-urlencoded"
JSON = ["application/json", "Application/JSON", "application/json; charset=utf-8", "application/json;charset=latin-1"]
JSON += ["application/vnd.api+json", "application/problem+json; charset=utf-8"]
OTHER = [
    "text/plain",
    "text/plain;charset=UTF-8",
    "multipart/form-data; boundary=x",
    "text/json",
    "application/xml",
    "*/*",
    "json",
]
OTHER += ["application/octet-stream", f"text/plain, {JSON[0]}", "text/plain; application/json", "application/jsonp", "+json"]
BROWSER = [{"origin": "https://evil.example"}, {"origin": "null"}, {"origin": "http://localhost:8000"}]
BROWSER += [{"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}]


SERVICE = ScriptedService(*letters("x"))
APP = app_of(SERVICE)  # building an application takes longer than all these requests


async def send(path, type_, **headers):
    SERVICE.requests.clear()
    async with client_for(APP) as client:
        headers |= {} if type_ is None else {"content-type": type_}
        answer = await client.post(path, content=ROUTES[path], headers={"host": "localhost", **headers})
    return answer, SERVICE


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("type_", [*JSON, FORM, f"{FORM}; charset=UTF-8", None, ""])
async def test_json_and_what_curl_sends_is_read(path, type_):
    answer, _ = await send(path, type_)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("type_", JSON)
async def test_json_of_a_page_is_read_since_its_browser_asks_first(path, type_):
    for headers in BROWSER:
        answer, _ = await send(path, type_, **headers)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("type_", OTHER)
async def test_another_type_is_415(path, type_):
    answer, service = await send(path, type_)
    assert answer.status_code == 415
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_media_type", "content-type")
    assert "application/json" in error["message"]
    assert not service.requests


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("type_", [FORM, None, "", "text/plain", "multipart/form-data; boundary=x"])
async def test_what_a_page_can_send_without_asking_is_415(path, type_):
    for headers in BROWSER:
        answer, service = await send(path, type_, **headers)
        assert answer.status_code == 415
        assert not service.requests
