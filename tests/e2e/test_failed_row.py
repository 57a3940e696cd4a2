"""Tests a real server whose model computes NaN for one request: that request ends with an error, and other requests succeed."""

import asyncio

from engine.fake import expected_tokens
from engine.models.families import read_spec
from engine.request import SamplingParams
from server.bundled import bundled_checkpoint
from tests.support import plain_http
from tests.support.children import ServerChild, wait_until

NUM_TOKENS = 30
BAD, GOOD = [5, 6, 7], [8, 9]
LOGGED = "a request's logits are not finite (NaN or infinity): the request is ended"


def body(prompt):
    return {"prompt_token_ids": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "cache": "off"}


async def test_a_row_that_is_not_finite_ends_alone_is_counted_and_is_logged():
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    limits = read_spec(bundled_checkpoint()).limits()
    bad, good = (expected_tokens(prompt, NUM_TOKENS, params, 0, limits) for prompt in (BAD, GOOD))
    at = next(i for i, token in enumerate(bad) if i > 3 and token not in bad[:i] + good)
    with ServerChild(fake_nan_token=bad[at]) as server:
        async with plain_http.AsyncClient(base_url=server.url, timeout=30) as client:
            unharmed, failed = await asyncio.gather(*(client.post("/v1/generate", json=body(prompt)) for prompt in (GOOD, BAD)))
            assert unharmed.json()["outputs"][0]["token_ids"] == good
            assert (failed.status_code, failed.json()["error"]["type"]) == (500, "server_error")
            again = await client.post("/v1/generate", json=body(GOOD))
            assert again.json()["outputs"][0]["token_ids"] == good
            async with asyncio.timeout(20):
                while "tidegate_engine_requests_failed_total 1.0" not in (await client.get("/metrics")).text:
                    pass  # the count of failures arrives with the engine's next heartbeat
        wait_until(lambda: server.said(LOGGED), "the failure is in the log")
        (line,) = server.said(LOGGED)
        assert (line["output_token"], line["process"]) == (at + 1, "engine 0")
        assert line["step"] > 0
        assert line["request_id"]
