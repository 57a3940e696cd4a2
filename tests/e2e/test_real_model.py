"""Tests the bundled model on the torch runner: its tokens are the same in-process, over HTTP, over gRPC, and if an engine
dies."""

import asyncio
import json
import os
import signal

import grpc
import pytest

from engine import LLM, SamplingParams
from server.bundled import bundled_checkpoint
from server.rpc.pb.tidegate.v1 import inference_pb2 as pb
from server.rpc.pb.tidegate.v1 import inference_pb2_grpc as pb_grpc
from tests.support import plain_http
from tests.support.children import ServerChild

NUM, TOKENS = 16, 40
PROMPTS = [[5 + (i * 37 + j * j) % 500 for j in range(3 + 4 * i)] for i in range(NUM)]


@pytest.fixture(scope="module")
def one_thread():
    """Let torch use one thread, since a second thread would only wait in a model this small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def expected(one_thread):
    """Return the tokens for each prompt, generated one prompt at a time by an engine in this process."""
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    with LLM(bundled_checkpoint(), overlap=False, cache={"prefix_caching": False, "num_blocks": 64}) as llm:
        return [llm.generate([prompt], params)[0].token_ids for prompt in PROMPTS]


@pytest.fixture(scope="module")
def real(one_thread):
    with ServerChild(runner="torch", overlap="true") as child:
        yield child


def body(i, **more):
    return {"prompt_token_ids": PROMPTS[i], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **more}


async def plain(client, i):
    answer = (await client.post("/v1/generate", json=body(i))).json()
    return answer["outputs"][0]["token_ids"]


async def streamed(client, i, first):
    tokens = []
    async with client.stream("POST", "/v1/generate", json=body(i, stream=True)) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                tokens += json.loads(line[6:])["token_ids"] if "token_ids" in line else []
                first.set()
    return tokens


async def over_grpc(stub, i):
    request = pb.GenerateRequest(prompt_token_ids=PROMPTS[i], max_tokens=TOKENS, temperature=0, ignore_eos=True)
    return [token async for answer in stub.Generate(request) for token in answer.chunk.token_ids]


async def test_a_crowd_gets_what_each_gets_alone_over_http_and_grpc(real, expected):
    async with (
        plain_http.AsyncClient(base_url=real.url, timeout=120) as client,
        grpc.aio.insecure_channel(f"127.0.0.1:{real.grpc_port}") as channel,
    ):
        stub = pb_grpc.InferenceStub(channel)
        for ask in (lambda i: plain(client, i), lambda i: over_grpc(stub, i)):
            assert await asyncio.gather(*(ask(i) for i in range(NUM))) == expected


async def test_streams_survive_the_engines_death_to_the_token(real, expected):
    async with plain_http.AsyncClient(base_url=real.url, timeout=120) as client:
        firsts = [asyncio.Event() for _ in range(NUM)]
        tasks = [asyncio.create_task(streamed(client, i, firsts[i])) for i in range(NUM)]
        await asyncio.gather(*(first.wait() for first in firsts))
        os.kill(real.children()["tidegate: engine 0"], signal.SIGKILL)
        await asyncio.sleep(0)
        assert not all(task.done() for task in tasks), "killed too late: nothing was in flight"
        assert await asyncio.gather(*tasks) == expected
