"""Kills the engine of a running server with SIGKILL at random moments, while it moves blocks between all tiers.

The fake engine verifies every block that it reads, and ends with an error if one is wrong. Every stream must go on with the
tokens that it would have had, and the first request after each restart must find its prefix on disk. Runs 10 kills;
TIDEGATE_TEST_KILLS=200 in the environment runs 200.
"""

import asyncio
import os
import random
import re
import signal

import httpx
import pytest

from engine.fake import expected_tokens
from engine.models.families import read_spec
from engine.request import SamplingParams
from server.bundled import bundled_checkpoint
from tests.support import plain_http
from tests.support.children import ServerChild, wait_until
from tests.support.serving import http, in_thread

NUM_KILLS = int(os.environ.get("TIDEGATE_TEST_KILLS", "10"))
BLOCK = 16
NUM_CLIENTS = 4
OUTPUT_TOKENS = 24
KEPT = [7 + i % 90 for i in range(20 * BLOCK + 1)]  # the prompt that is asked for after each kill, and by nobody else


@pytest.fixture(scope="module")
def limits():
    return read_spec(bundled_checkpoint()).limits()


@pytest.fixture
def tiered(tmp_path):
    """Yield a server whose GPU cache and host tier hold a part of the sessions, and whose disk holds all."""
    page = 4096
    with ServerChild(
        fake_step_ms=1,
        fake_token_us=1000,  # else computing a prompt would be faster than reading it from disk
        debug_checks=True,
        block_size=BLOCK,
        num_blocks=150,
        fake_block_bytes=page,
        host_tier_bytes=40 * page,
        disk_tier_folder=tmp_path / "kv",
        disk_tier_bytes=64 << 20,
        crash_limit=20,
    ) as server:
        yield server


def prompt_of(session: int, turn: int) -> list[int]:
    """Return the prompt of a turn: it begins as the turns before."""
    rng = random.Random(session)
    return [rng.randrange(5, 200) for _ in range(100 + 50 * (turn % 12))]


async def generate(client: httpx.AsyncClient, prompt: list[int]) -> tuple[list[int], int]:
    """Return the tokens of one answer, and how many tokens of its prompt were cached."""
    body = {"prompt_token_ids": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
    response = await client.post("/v1/generate", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["outputs"][0]["token_ids"], answer["usage"]["cached_tokens"]


def num_on_disk(server) -> float:
    """Return how many blocks the disk tier has. 0 before the engine's first heartbeat."""
    text = plain_http.get(server.url + "/metrics").text
    found = re.search(r'^tidegate_tier_blocks_used{[^}]*tier="disk"[^}]*} (\S+)$', text, re.M)
    return float(found[1]) if found else 0.0


async def test_streams_survive_kills_of_the_engine_and_its_disk_tier(tiered, limits):
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
    rng, num_ended, stop = random.Random(1), 0, False

    def right(prompt: list[int]) -> list[int]:
        return expected_tokens(prompt, OUTPUT_TOKENS, params, 0, limits)

    async def converse(client: httpx.AsyncClient, number: int) -> None:
        nonlocal num_ended
        turn = 0
        while not stop:
            prompt = prompt_of(number * 100 + turn // 12 % 3, turn)
            assert (await generate(client, prompt))[0] == right(prompt)
            num_ended, turn = num_ended + 1, turn + 1

    async with http(tiered) as client:
        assert await generate(client, KEPT) == (right(KEPT), 0)
        await in_thread(wait_until, lambda: num_on_disk(tiered) >= 20, "the blocks are on disk")
        clients = [asyncio.create_task(converse(client, number)) for number in range(NUM_CLIENTS)]
        for _ in range(NUM_KILLS):
            await in_thread(wait_until, lambda: "tidegate: engine 0" in tiered.children(), "there is an engine")
            until = num_ended + rng.randrange(1, 40)
            while num_ended < until:
                await asyncio.wait(clients, timeout=0.01, return_when=asyncio.FIRST_COMPLETED)
                assert not any(task.done() for task in clients), [task.exception() for task in clients if task.done()]
            os.kill(tiered.children()["tidegate: engine 0"], signal.SIGKILL)
            # Only the disk can have the prefix now. It is on the GPU if the request gave it back to others and found it again.
            assert await generate(client, KEPT) == (right(KEPT), 20 * BLOCK)
        stop = True
        await asyncio.gather(*clients)
    assert not [line for line in tiered.text if "Error" in line and "ConnectionError" not in line]
