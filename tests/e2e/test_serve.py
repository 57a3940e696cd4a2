"""Tests a real `tidegate serve` with the fake engine: processes die, the server drains, clients leave, and wrong settings are
refused."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket

import grpc
import httpx
import psutil
import pytest

from server.rpc.pb.tidegate.v1 import inference_pb2 as pb
from server.rpc.pb.tidegate.v1 import inference_pb2_grpc as pb_grpc
from tests.support import plain_http
from tests.support.children import ServerChild, wait_until
from tests.support.serving import (
    body,
    engine_running,
    http,
    in_thread,
    metrics,
    refused,
    refused_start,
    stream_tokens,
    used_blocks,
)
from tests.support.tiny_checkpoint import write_tiny_checkpoint


async def test_streams_survive_the_engines_death_with_the_same_tokens(fresh):
    async with http(fresh) as client:
        undisturbed = await asyncio.gather(*(stream_tokens(client, i) for i in range(32)))
        firsts = [asyncio.Event() for _ in range(32)]
        tasks = [asyncio.create_task(stream_tokens(client, i, first=firsts[i])) for i in range(32)]
        await asyncio.gather(*(first.wait() for first in firsts))
        old = fresh.children()["tidegate: engine 0"]
        os.kill(old, signal.SIGKILL)
        await asyncio.sleep(0)
        assert not all(task.done() for task in tasks), "killed too late: nothing was in flight"
        assert await asyncio.gather(*tasks) == undisturbed
        assert all(len(tokens) == 100 for tokens in undisturbed)
        assert fresh.children()["tidegate: engine 0"] != old
    await in_thread(wait_until, lambda: used_blocks(fresh) == 0, "blocks are free")
    counts = metrics(fresh)
    assert counts["tidegate_requests_started_total"] == counts["tidegate_requests_finished_total"] == 64


async def test_sigterm_lets_streams_finish_and_refuses_new_connections(fresh):
    async with http(fresh) as client:
        first = asyncio.Event()
        tasks = [asyncio.create_task(stream_tokens(client, i, 300, first=first)) for i in range(8)]
        await first.wait()
        fresh.process.send_signal(signal.SIGTERM)

        await in_thread(wait_until, lambda: refused(fresh.port), "new connections are refused")
        assert not all(task.done() for task in tasks), "refused only after all had ended"
        assert all(len(tokens) == 300 for tokens in await asyncio.gather(*tasks))
    assert await in_thread(fresh.process.wait, 10) == 0
    assert not any(line["level"] in ("error", "critical") for line in fresh.lines)
    assert os.listdir(fresh.folder.name) == []


async def test_a_stream_that_outlasts_the_time_to_drain_ends_with_an_error():
    """The stream would take 20 seconds, but the server drains for only 2 seconds."""
    with ServerChild(drain_timeout_s=2, fake_step_ms=50) as server:
        async with http(server) as client:
            first = asyncio.Event()
            task = asyncio.create_task(stream_tokens(client, 1, 400, first=first))
            await first.wait()
            server.process.send_signal(signal.SIGTERM)
            error = await task
            assert error["code"] == "engine_unavailable"
            assert "shutting down" in error["message"]
        assert await in_thread(server.process.wait, 10) == 0


async def test_a_second_signal_ends_the_streams_at_once():
    with ServerChild(drain_timeout_s=60, fake_step_ms=50) as server:
        async with http(server) as client:
            first = asyncio.Event()
            task = asyncio.create_task(stream_tokens(client, 1, 400, first=first))
            await first.wait()
            server.process.send_signal(signal.SIGINT)
            await in_thread(wait_until, lambda: server.said("draining"), "the worker drains")
            assert not task.done()
            server.process.send_signal(signal.SIGINT)
            assert (await task)["code"] == "engine_unavailable"
        assert await in_thread(server.process.wait, 20) == 0


def test_no_child_outlives_the_supervisor():
    with ServerChild(api_workers=2) as server:
        children = [psutil.Process(pid) for pid in server.children().values()]
        assert sorted(server.children()) == ["tidegate: api 0", "tidegate: api 1", "tidegate: engine 0"]
        os.kill(server.children()["tidegate: api 1"], signal.SIGSTOP)
        server.process.kill()
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive


async def test_a_hung_engine_is_replaced_and_its_streams_go_on():
    """The test stops the engine process during a stream. The server must kill the engine after stall_timeout_s."""
    with ServerChild(stall_timeout_s=1) as server:
        async with http(server) as client:
            undisturbed = await stream_tokens(client, 1, 120)
            first = asyncio.Event()
            task = asyncio.create_task(stream_tokens(client, 1, 120, first=first))
            await first.wait()
            old = server.children()["tidegate: engine 0"]
            os.kill(old, signal.SIGSTOP)
            assert not task.done(), "stopped too late"
            assert await asyncio.wait_for(task, 30) == undisturbed
            assert server.children()["tidegate: engine 0"] != old
        assert server.said("engine 0 makes no progress and is killed")


async def test_streams_end_with_an_error_when_the_server_gives_up():
    with ServerChild(crash_limit=1, fake_step_ms=50) as server:
        async with http(server) as client:
            first = asyncio.Event()
            task = asyncio.create_task(stream_tokens(client, 1, 400, first=first))
            await first.wait()
            os.kill(server.children()["tidegate: engine 0"], signal.SIGKILL)
            assert (await asyncio.wait_for(task, 30))["code"] == "engine_unavailable"
        assert await in_thread(server.process.wait, 20) == 1
        await in_thread(wait_until, lambda: any("died 1 times" in line["message"] for line in server.lines), "the reason")


async def test_a_request_that_comes_while_the_engine_restarts_is_answered(fresh):
    os.kill(fresh.children()["tidegate: engine 0"], signal.SIGKILL)
    await in_thread(wait_until, lambda: plain_http.get(fresh.url + "/health/ready").status_code == 503, "the death is noticed")
    async with http(fresh) as client:
        assert len(await stream_tokens(client, 1, 5)) == 5


async def test_a_dead_worker_is_replaced_and_its_requests_leave_the_engine(fresh):
    async with http(fresh) as client:
        first = asyncio.Event()
        tasks = [asyncio.create_task(stream_tokens(client, i, 450, first=first)) for i in range(4)]
        await first.wait()
        os.kill(fresh.children()["tidegate: api 0"], signal.SIGKILL)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, httpx.HTTPError) for result in results)

    def is_ready():
        with contextlib.suppress(httpx.HTTPError):
            return plain_http.get(fresh.url + "/health/ready").status_code == 200
        return False

    await in_thread(wait_until, is_ready, "another worker is ready", seconds=40)
    await in_thread(wait_until, lambda: engine_running(fresh) == 0 and used_blocks(fresh) == 0, "its blocks are free")
    counts = metrics(fresh)
    assert counts["tidegate_requests_failed_total"] == 4
    assert counts.get("tidegate_requests_running", 0) == 0


async def leave_http_stream(server):
    async with http(server) as client:
        first = asyncio.Event()
        task = asyncio.create_task(stream_tokens(client, 1, 450, first=first))
        await first.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def leave_http_plain(server):
    async with http(server) as client:
        task = asyncio.create_task(client.post("/v1/generate", json=body(1, 450)))
        await in_thread(wait_until, lambda: engine_running(server) == 1, "running")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def leave_grpc(server):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        request = pb.GenerateRequest(prompt_token_ids=body(1)["prompt_token_ids"], max_tokens=450, ignore_eos=True)
        call = pb_grpc.InferenceStub(channel).Generate(request)
        await call.read()
        call.cancel()


@pytest.mark.parametrize("leave", [leave_http_stream, leave_http_plain, leave_grpc], ids=["sse", "plain", "grpc"])
async def test_a_client_that_disconnects_frees_its_blocks_at_once(server, leave):
    """After the client disconnects, the engine must stop long before the 450 steps that the request would have taken."""
    await in_thread(wait_until, lambda: engine_running(server) == 0, "idle")
    before = metrics(server)
    await leave(server)
    await in_thread(wait_until, lambda: engine_running(server) == 0 and used_blocks(server) == 0, "freed")
    after = metrics(server)
    assert after["tidegate_requests_aborted_total"] == before.get("tidegate_requests_aborted_total", 0) + 1
    assert after["tidegate_engine_steps_total"] - before["tidegate_engine_steps_total"] < 400


def test_a_stopped_engine_is_not_ready(server):
    engine = server.children()["tidegate: engine 0"]
    os.kill(engine, signal.SIGSTOP)
    try:
        wait_until(lambda: plain_http.get(server.url + "/health/ready").status_code == 503, "not ready")
        assert plain_http.get(server.url + "/health/live").status_code == 200
    finally:
        os.kill(engine, signal.SIGCONT)
    wait_until(lambda: plain_http.get(server.url + "/health/ready").status_code == 200, "ready again")


@pytest.mark.parametrize("workers", [1, 2])
def test_two_servers_can_run_on_one_host(workers):
    with ServerChild(api_workers=workers) as one, ServerChild(api_workers=workers) as two:
        assert {one.port, one.grpc_port, one.admin_port}.isdisjoint({two.port, two.grpc_port, two.admin_port})
        for server in (one, two):
            answer = plain_http.post(server.url + "/v1/generate", json=body(1, 5), timeout=20).json()
            assert len(answer["outputs"][0]["token_ids"]) == 5
        for taken in ({"port": one.port}, {"grpc_port": one.grpc_port}, {"admin_port": one.admin_port}):
            third = ServerChild(**taken)
            third.start()
            assert third.process.wait(20) == 2
            wait_until(lambda server=third: server.lines, "its one message")
            third.stop()
            assert next(iter(taken)) in third.lines[-1]["message"]


def test_a_crash_loop_ends_the_server_with_the_reason():
    """The test kills each new engine as soon as its process exists."""
    with ServerChild(crash_limit=3) as server:
        killed = set()

        def ended():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                for name, pid in server.children().items():
                    if name == "tidegate: engine 0" and pid not in killed:
                        killed.add(pid)
                        os.kill(pid, signal.SIGKILL)
            return server.pid_gone

        wait_until(ended, "the server gives up", seconds=40)
        assert server.process.wait() == 1
        assert len(killed) == 3
        wait_until(lambda: any("died 3 times" in line["message"] for line in server.lines), "the reason")


def test_garbage_on_the_grpc_port_puts_nothing_but_json_into_the_log(fresh):
    """By default, gRPC's core writes lines that are not JSON to standard error when it receives invalid bytes.

    One kind of invalid bytes is a request with `:status`, which is a header of responses.
    """

    def frame(kind, flags, stream, payload=b""):
        return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload

    headers = frame(1, 5, 1, b"\x08\x03abc")  # a header frame with :status "abc"
    for garbage in (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0) + headers, b"\x00" * 500):
        with socket.create_connection(("127.0.0.1", fresh.grpc_port), 5) as client:
            client.sendall(garbage)
            client.shutdown(socket.SHUT_WR)
            while client.recv(4096):
                pass
    fresh.process.send_signal(signal.SIGTERM)
    wait_until(lambda: fresh.said("stopped"), "all that was logged has been read")
    assert [line for line in fresh.text if not line.startswith("{")] == []


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TIDEGATE_PORT": "many"}, "port is 'many' (from TIDEGATE_PORT): it must be a whole number from 0 to 65535"),
        ({"TIDEGATE_PROT": "1"}, "TIDEGATE_PROT is set in the environment, but there is no such setting: did you mean 'port'?"),
        ({"TIDEGATE_MODEL": "/nowhere"}, "model is '/nowhere': it must be a checkpoint folder"),
        ({"TIDEGATE_HOST": "192.0.2.1"}, "cannot be bound on 192.0.2.1"),
        ({"TIDEGATE_MAX_MODEL_LEN": "100000000"}, "max_model_len is 100000000, but the model was made for"),
    ],
    ids=["type", "unknown", "model", "host", "engine"],
)
def test_a_wrong_setting_stops_the_start_with_one_message(variables, expected):
    done = refused_start(variables)
    assert done.stderr.count(expected) == 1


NESTED = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("config.json", NESTED, "config.json: cannot be read as JSON: it is nested too deeply"),
        ("generation_config.json", NESTED, "generation_config.json: cannot be read as JSON: it is nested too deeply"),
        ("config.json", {"vocab_size": 10**12}, "vocab_size is 1000000000000: it must be an integer from 1 to"),
        ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000: it must be an integer from 1 to"),
        ("config.json", {"vocab_size": 1 << 24, "hidden_size": 1 << 17}, "the model's weights need"),
    ],
    ids=["nested", "nested generation", "vocabulary", "layers", "memory"],
)
def test_a_faulty_checkpoint_stops_the_start_with_one_message(tmp_path, file, changes, expected):
    folder = tmp_path / "model"
    shutil.copytree(write_tiny_checkpoint(tmp_path / "demo"), folder)
    text = changes if isinstance(changes, str) else json.dumps(json.loads((folder / file).read_text()) | changes)
    (folder / file).write_text(text)
    done = refused_start({"TIDEGATE_MODEL": str(folder), "TIDEGATE_RUNNER": "torch", "TIDEGATE_DEVICE": "cpu"})
    (line,) = done.stderr.splitlines()
    assert expected in json.loads(line)["message"]
