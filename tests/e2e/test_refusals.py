"""Tests what clients of a real server get when its queue is full: a status of their protocol, the time to wait, and no event."""

import asyncio
import contextlib

import grpc
import pytest

from server.rpc.pb.tidegate.v1 import inference_pb2 as pb
from server.rpc.pb.tidegate.v1 import inference_pb2_grpc as pb_grpc
from tests.support.children import ServerChild, wait_until
from tests.support.rpc import detail_of
from tests.support.serving import body, http, in_thread, metrics, stream_tokens
from tests.support.tiny_checkpoint import write_tiny_checkpoint

ROUTES = {
    "/v1/generate": {"prompt": "x"},
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = write_tiny_checkpoint(tmp_path_factory.mktemp("model"))
    with ServerChild(model=model, max_num_seqs=1, max_queue=1, fake_step_ms=20) as child:
        yield child


@contextlib.asynccontextmanager
async def full_queue(server):
    """Keep one request running and one waiting, which is as much as the server takes. The running one must get its tokens."""
    async with http(server) as client:
        first = asyncio.Event()
        running = asyncio.create_task(stream_tokens(client, 1, 400, first=first))
        await first.wait()
        waiting = asyncio.create_task(stream_tokens(client, 2, 1))
        await in_thread(wait_until, lambda: metrics(server).get("tidegate_engine_requests_waiting") == 1, "one request waits")
        yield client
        assert not running.done(), "the queue was not full all the time"
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert len(await waiting) == 1
        assert len(await stream_tokens(client, 3, 5)) == 5


async def test_a_refused_request_gets_429_and_retry_after_also_if_it_asked_for_a_stream(server):
    before = metrics(server).get("tidegate_requests_failed_total", 0)
    async with full_queue(server) as client:
        for path, plain in ROUTES.items():
            for more in ({}, {"stream": True}):
                answer = await client.post(path, json=plain | more)
                assert answer.status_code == 429, answer.text
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.headers["content-type"] == "application/json"
                error = answer.json()["error"]
                assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
    assert metrics(server)["tidegate_requests_failed_total"] - before == 2 * len(ROUTES)


async def test_a_refused_grpc_call_gets_resource_exhausted_and_the_time_to_wait(server):
    async with full_queue(server), grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = pb_grpc.InferenceStub(channel)
        asked = pb.GenerateRequest(prompt_token_ids=body(4)["prompt_token_ids"], slo_class="interactive")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(aiter(stub.Generate(asked)))  # there is no response before the status
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        detail = detail_of(caught.value)
        assert (detail.type, detail.code) == ("rate_limit_error", "overloaded")
        assert detail.retry_after >= 1
