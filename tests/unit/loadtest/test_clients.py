"""Tests the clients against a server whose answers are written by hand, and what the prober says of a wrong endpoint."""

import asyncio
import contextlib
import socket

import pytest
from typer.testing import CliRunner

from loadtest.cli import app
from loadtest.clients import build_client
from loadtest.clients.base import Call
from loadtest.prompts import Prompt
from loadtest.record import Failure, Reading
from loadtest.spec import Target
from tests.unit.loadtest.samples import load

STREAM = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
JSON = "HTTP/1.1 {} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n{}\r\n{}"


def chunk(text):
    return f"{len(text):x}\r\n{text}\r\n"


def stream(*pieces, end="0\r\n\r\n"):
    return STREAM + "".join(map(chunk, pieces)) + end


def answer(status, body, headers=""):
    return JSON.format(status, len(body), headers, body)


@contextlib.asynccontextmanager
async def server(*answers, close=False):
    """Serve the answers one after the other, whatever is asked. Yields the URL and the connections' numbers of requests."""
    left, served = list(answers), []

    async def serve(reader, writer):
        served.append(0)
        number = len(served) - 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while left:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                await reader.readexactly(int(head.partition("content-length: ")[2].split()[0]) if "content-length" in head else 0)
                served[number] += 1
                writer.write(left.pop(0).encode())
                await writer.drain()
                if close:
                    break
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", served
    finally:
        listening.close()


async def ask(url, route="completions", **fields):
    client = build_client(Target(url, route, model="m"), load())
    reading = Reading(keep=True)
    try:
        prompt = Prompt(messages=[]) if route == "chat" else Prompt(text="x")
        await client.stream(Call(prompt, 4, **fields), reading)
    finally:
        await client.close()
    return reading


async def test_completions():
    usage = 'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3,"total_tokens":8}}\n\n'
    pieces = [
        'data: {"choices":[{"text":"a","finish_reason":null}]}\n\nda',
        'ta: {"choices":[{"text":"","finish_reason":null}]}\r\n\r\n',
    ]
    last = 'data: {"choices":[{"text":"","finish_reason":"length"}]}\n\n'
    async with server(stream(*pieces, ": comment\n\n", last, usage, "data: [DONE]\n\n")) as (url, _):
        reading = await ask(url)
    assert (len(reading.events), reading.prompt_tokens, reading.output_tokens, reading.answer_text) == (2, 5, 3, ["a"])
    assert list(reading.tokens) == [0, 0]


async def test_the_role_of_a_chat_is_no_token():
    deltas = ['{"role":"assistant","content":""}', '{"reasoning_content":"hm"}', '{"content":"a"}', "{}"]
    ends = ["null", "null", "null", '"stop"']
    events = [f'data: {{"choices":[{{"delta":{d},"finish_reason":{e}}}]}}\n\n' for d, e in zip(deltas, ends, strict=True)]
    async with server(stream(*events, "data: [DONE]\n\n")) as (url, _):
        reading = await ask(url, "chat")
    assert (len(reading.events), reading.answer_text, reading.output_tokens) == (2, ["hm", "a"], None)


async def test_generate_reports_the_tokens_of_each_event():
    events = ['data: {"token_ids":[7,8]}\n\n', 'data: {"token_ids":[],"text":"x"}\n\n']
    end = 'data: {"token_ids":[9],"usage":{"prompt_tokens":1,"completion_tokens":3,"cached_tokens":1}}\n\n'
    async with server(stream(*events, end, "data: [DONE]\n\n")) as (url, _):
        reading = await ask(url, "generate")
    assert (list(reading.tokens), reading.answer_ids, reading.cached_tokens) == ([2, 1], [7, 8, 9], 1)


async def test_a_connection_is_used_again_after_a_whole_answer():
    good = stream('data: {"choices":[{"text":"a","finish_reason":null}]}\n\n', "data: [DONE]\n\n")
    async with server(good, answer(429, "{}"), good) as (url, served):
        client = build_client(Target(url, "completions", model="m"), load())
        for expected in (None, "429", None):
            with contextlib.nullcontext() if expected is None else pytest.raises(Failure, match=expected):
                await client.stream(Call(Prompt(text="x"), 4), Reading())
        await client.close()
    assert served == [3]


@pytest.mark.parametrize(
    ("reply", "status", "refused"),
    [
        (answer(429, '{"error":{"code":"overloaded","message":"busy"}}', "retry-after: 7\r\n"), "429 overloaded", True),
        (answer(503, "draining"), "503", True),
        (answer(400, '{"error":{"type":"invalid","message":"no"}}'), "400 invalid", False),
        (answer(500, "[]"), "500", False),
        (answer(200, "{}"), "not a stream", False),
        (stream('data: {"choices":[{"text":"a"}]}\n\n'), "closed early", False),
        (stream("data: {broken\n\n"), "not JSON", False),
        (stream("data: [1]\n\n"), "not an object", False),
        (stream('data: {"error":{"code":"engine_dead","message":"x"}}\n\n'), "error in stream: engine_dead", False),
        ("SSH-2.0-OpenSSH\r\n", "not HTTP", False),
        ("", "closed early", False),
        (stream('data: {"choices":[{"text":"a"}]}\n\n', end=""), "closed early", False),
    ],
)
async def test_failures_are_named(reply, status, refused):
    async with server(reply, close=True) as (url, _):
        with pytest.raises(Failure) as failed:
            await ask(url)
    assert (failed.value.status, failed.value.refused) == (status, refused)
    assert failed.value.retry_after == (7.0 if "retry-after" in reply else None)


async def test_a_stream_that_ends_by_closing_is_whole_if_done_came():
    head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    async with server(head + 'data: {"choices":[{"text":"a"}]}\n\ndata: [DONE]\n\n', close=True) as (url, _):
        assert len((await ask(url)).events) == 1


async def test_a_slow_reader_takes_the_whole_answer():
    events = ['data: {"choices":[{"text":"%s"}]}\n\n' % ("a" * 50)] * 20
    async with server(stream(*events, "data: [DONE]\n\n")) as (url, _):
        client = build_client(Target(url, "completions", model="m"), load(slow_bytes=1e6))
        reading = Reading()
        await client.stream(Call(Prompt(text="x"), 4, slow=True), reading)
        await client.close()
    assert len(reading.events) == 20


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def said(*arguments):
    result = CliRunner().invoke(app, ["run", *arguments, "--rate", "5", "--seconds", "9", "--seed", "1"])
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def test_an_endpoint_that_refuses_the_connection_is_named():
    url = f"http://127.0.0.1:{free_port()}"
    assert f"{url} cannot be reached: [Errno 111] Connection refused; is the server running" in said(url)
    assert "ListModels failed with UNAVAILABLE" in said(url.removeprefix("http://"), "--route", "grpc")


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        (["SSH-2.0-OpenSSH\r\n"], "was not answered in HTTP (BadStatusLine): is this the server's HTTP port?"),
        ([answer(404, "{}")], "answered 404: this is no OpenAI-compatible endpoint"),
        ([answer(401, "{}")], "give it with --api-key"),
        ([answer(200, "<html>")], "is no OpenAI-compatible endpoint"),
        ([answer(200, '{"data":[]}')], "lists no model"),
        ([answer(200, '{"data":[{"id":"m"}]}'), answer(404, "{}")], "try --route completions or chat"),
        ([answer(200, '{"data":[{"id":"m"}]}'), answer(400, '{"error":{"message":"token id 9999"}}')], "with --vocab"),
        ([answer(200, '{"data":[{"id":"m"}]}'), answer(200, "{}")], "instead of text/event-stream"),
        ([answer(200, '{"data":[{"id":"m"}]}'), stream("data: [DONE]\n\n")], "had no token"),
    ],
)
async def test_an_endpoint_of_another_kind_is_named(replies, message):
    async with server(*replies, close=True) as (url, _):
        assert message in await asyncio.to_thread(said, url)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["localhost:8000"], "is no URL of a server"),
        (["http://x", "--route", "soap"], "--route is 'soap': it must be one of generate, completions, chat, grpc"),
        (["ftp://x"], "is no URL of a server"),
        (["http://[x"], "is no URL of a server"),
        (["http://x:y"], "is no URL of a server"),
        (["http://nobody.invalid"], "cannot be reached"),
        (["http://x", "--route", "grpc"], "is no gRPC address"),
    ],
)
def test_wrong_targets_are_named(arguments, message):
    assert message in said(*arguments)
