"""Tests that the outputs of several prompts are numbered in one sequence, and that this does not change the chunks themselves."""

import msgspec
import pytest

from engine.errors import InternalError
from server.http.routes.collect import Collector, merge, renumbered
from server.http.routes.logprobs import write_each
from server.service.pacing import Pacer
from server.service.types import Chunk, Ending
from tests.unit.server.http.routes.scripted import ScriptedService, letters
from tests.unit.server.http.routes.serve import events_of, post

BODY = {"model": "tiny", "prompt": ["p", "q", "r"], "n": 2}


def script():
    return [*letters("ab"), *letters("cd", index=1, finish="stop")]


def as_data(chunks):
    return [msgspec.to_builtins(chunk) for chunk in chunks]


def without_names(answer):
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


async def replay(chunks):
    for chunk in chunks:
        yield chunk


async def test_a_chunk_cannot_be_changed():
    with pytest.raises(AttributeError):
        letters("a")[0].index = 1


@pytest.mark.parametrize("first_index", [0, 1, 6])
async def test_renumbering_makes_a_copy(first_index):
    chunk = letters("a", index=1)[0]
    assert renumbered(chunk, first_index).index == 1 + first_index
    assert chunk.index == 1
    assert msgspec.structs.replace(renumbered(chunk, first_index), index=1) == chunk


async def test_merging_the_same_chunks_twice_gives_equal_streams():
    """A response cache could replay stored chunks, so merging must not change the chunks."""
    chunks = script()
    before = as_data(chunks)
    merged = [sorted([(c.index, c.text) async for c in merge([replay(chunks) for _ in range(3)], 2)]) for _ in range(2)]
    assert merged[0] == merged[1]
    assert {index for index, _ in merged[0]} == set(range(6))
    assert as_data(chunks) == before


@pytest.mark.parametrize("path_body", [("/v1/completions", BODY), ("/v1/generate", {"prompt": "x", "n": 2})])
async def test_the_same_chunks_give_equal_answers_each_time(path_body):
    path, body = path_body
    service = ScriptedService(*script())
    answers = [(await post(service, path, body))[1] for _ in range(2)]
    assert without_names(answers[0]) == without_names(answers[1])
    streams = [await events_of(service, path, body) for _ in range(2)]
    orders = [sorted(str(without_names(e)) for e in stream if e != "[DONE]") for stream in streams]
    assert orders[0] == orders[1]
    assert as_data(service.script) == as_data(script())


async def test_a_stream_without_an_ending_is_an_error():
    collector = Collector(1, write_each(list, list), Pacer())
    with pytest.raises(InternalError):
        await collector.collect(replay(letters("ab")))


async def test_each_prompt_keeps_its_ending():
    service = ScriptedService(*letters("ab"))

    class Request:
        model = None
        request_id = "r"

    items = [item async for item in merge([service.generate(Request, service.anonymous) for _ in range(3)], 1)]
    assert sum(isinstance(item, Ending) for item in items) == 3
    assert sum(isinstance(item, Chunk) for item in items) == 6
