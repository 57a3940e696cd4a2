"""Tests that answers with many log-probabilities do not block the event loop. The tests count work and do not measure time."""

import asyncio

import httpx
import pytest

from engine.request import TokenLogprobs
from server.http.json_parts import PART_BYTES
from server.service.pacing import SLICE
from server.service.types import Chunk
from tests.unit.server.http.routes.scripted import ScriptedService
from tests.unit.server.http.routes.serve import app_of, client_of, events_of, post

TOP = 20
ASK = {
    "/v1/generate": {"prompt": "x", "logprobs": TOP, "prompt_logprobs": TOP},
    "/v1/completions": {"model": "tiny", "prompt": "x", "logprobs": TOP, "prompt_logprobs": TOP},
    "/v1/completions with echo": {"model": "tiny", "prompt": "x", "logprobs": TOP, "echo": True},
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "logprobs": True,
        "top_logprobs": TOP,
        "prompt_logprobs": TOP,
    },
}


def position(token, top=TOP):
    return TokenLogprobs(token, -0.5, 1, [token + i for i in range(top)], [-0.5 - i for i in range(top)])


class CountingService(ScriptedService):
    """Counts how many tokens the routes format between two runs of another task. A route calls token_text() for each token."""

    def __init__(self, *script):
        super().__init__(*script)
        self.lookups = self.most_lookups = self.total = 0

    def token_text(self, token):
        self.lookups += 1
        self.total += 1
        return "t"

    async def watch(self):
        while True:
            self.most_lookups = max(self.most_lookups, self.lookups)
            self.lookups = 0
            await asyncio.sleep(0)


async def most_lookups(service, path, stream):
    """Post a request to `path`. Returns the answer's status, and the largest number of tokens formatted while no other task could
    run."""
    watcher = asyncio.create_task(service.watch())
    await asyncio.sleep(0)
    async with client_of(service) as client:
        response = await client.post(path.split()[0], json={**ASK[path], "stream": stream})
    await asyncio.sleep(0)
    watcher.cancel()
    return response.status_code, service.most_lookups


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ASK)
async def test_a_long_prompts_log_probabilities_are_formatted_in_slices(path, stream):
    prompt = [None, *(position(65 + i % 50) for i in range(1000))]
    chunk = Chunk(index=0, text="x", token_ids=[1], logprobs=[position(65)], prompt_logprobs=prompt, finish_reason="length")
    service = CountingService(chunk)
    status, most = await most_lookups(service, path, stream)
    assert status == 200
    assert service.total > 20 * SLICE
    assert most < 2 * SLICE + 2 * TOP


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ASK)
@pytest.mark.parametrize("together", [1, 500])
async def test_a_long_outputs_log_probabilities_are_formatted_in_slices(path, stream, together):
    """All chunks, of one token or of 500, are ready at once. So other tasks run only when the route lets them."""
    chunks = [
        Chunk(index=0, text="x" * together, token_ids=[1] * together, logprobs=[position(65)] * together)
        for _ in range(1000 // together)
    ]
    end = Chunk(index=0, text="", token_ids=[], finish_reason="length")
    service = CountingService(*chunks, end)
    status, most = await most_lookups(service, path, stream)
    assert status == 200
    assert service.total > 20 * SLICE
    assert most < 2 * SLICE + 2 * TOP


async def test_several_large_answers_share_each_loop_iteration():
    prompt = [None, *(position(65) for _ in range(500))]
    chunk = Chunk(index=0, text="x", token_ids=[1], prompt_logprobs=prompt, finish_reason="length")
    service = CountingService(chunk)
    watcher = asyncio.create_task(service.watch())
    async with client_of(service) as client:
        answers = await asyncio.gather(
            *(client.post("/v1/generate", json={"prompt": "x", "prompt_logprobs": TOP}) for _ in range(8))
        )
    watcher.cancel()
    assert [answer.status_code for answer in answers] == [200] * 8
    # The first slice of each answer runs when the answer's chunk arrives. After that, all answers together run one slice in each
    # iteration of the event loop.
    assert service.most_lookups <= 8 * (SLICE + TOP)
    assert service.total == 8 * (500 * (TOP + 1))


@pytest.mark.parametrize("path", ASK)
async def test_a_large_answer_says_the_same_whole_and_streamed(path):
    prompt = [None, *(position(65 + i % 50) for i in range(300))]
    first = Chunk(index=0, text="ab", token_ids=[1, 2], logprobs=[position(70)] * 150, prompt_logprobs=prompt)
    last = Chunk(index=0, text="c", token_ids=[3], logprobs=[position(71)] * 50, finish_reason="length")
    service = ScriptedService(first, last)
    _, whole = await post(service, path.split()[0], ASK[path])
    events = await events_of(service, path.split()[0], ASK[path])
    if path == "/v1/generate":
        (output,) = whole["outputs"]
        assert [at for e in events[:-1] for at in e["logprobs"]] == output["logprobs"]
        assert len(output["logprobs"]) == 200
        assert events[0]["prompt_logprobs"] == output["prompt_logprobs"]
        assert len(output["prompt_logprobs"]) == 301
        return
    (choice,) = whole["choices"]
    streamed = [e["choices"][0] for e in events[:-1]]
    if "chat" in path:
        streamed.pop(0)  # the first event has only the role
        assert [at for c in streamed for at in c["logprobs"]["content"]] == choice["logprobs"]["content"]
        assert events[0]["prompt_logprobs"] == whole["prompt_logprobs"]
        return
    assert streamed[0].get("prompt_logprobs") == choice.get("prompt_logprobs")
    for column in ("tokens", "token_logprobs", "top_logprobs"):
        assert [at for c in streamed for at in c["logprobs"][column]] == choice["logprobs"][column]
    assert len(choice["logprobs"]["tokens"]) == 200 + 301 * ("echo" in path)


async def test_a_large_answer_is_sent_in_pieces_and_other_tasks_run_between_them():
    chunk = Chunk(index=0, text="x", token_ids=[1], logprobs=[position(65)] * 500, finish_reason="length")
    sent, runs = [], 0

    async def count_runs():
        nonlocal runs
        while True:
            runs += 1
            await asyncio.sleep(0)

    app = app_of(ScriptedService(chunk))

    async def recording(scope, receive, send):
        async def record(message):
            if message["type"] == "http.response.body":
                sent.append((len(message["body"]), runs))
            await send(message)

        await app(scope, receive, record)

    counter = asyncio.create_task(count_runs())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(recording), base_url="http://test") as client:
        response = await client.post("/v1/generate", json={"prompt": "x", "logprobs": TOP})
    counter.cancel()
    assert int(response.headers["content-length"]) == len(response.content) == sum(size for size, _ in sent)
    assert len(response.content) > 4 * PART_BYTES
    assert max(size for size, _ in sent) < 3 * PART_BYTES
    runs_at_pieces = [at for _, at in sent]
    assert len(set(runs_at_pieces)) == len(sent)
