"""Tests of Suspects with EngineClient: which streams are ended for engine deaths, and that all other streams continue."""

import msgspec
import pytest

from engine.errors import ContextTooLong, EngineUnavailable, InternalError
from engine.messages import Abort, Submit, Welcome
from engine.request import RequestFailure
from server.engines import zmq_connection
from tests.support.engine_client import engine_client
from tests.unit.server.engines.scripted_engine import (
    collect,
    count_calls,
    fill_send_queue,
    outputs_of,
    read_until,
    request,
    tokens_of,
    until,
)


async def make_suspects(client, engine, *names):
    """Submit requests and let two engines die with them before any has a token. Returns the streams by name."""
    streams = {name: client.submit(request(name, max_tokens=20)) for name in names}
    for _ in range(2):
        assert await engine.receive_ids(len(names)) == list(names)
        await engine.replace(client)
    return streams


def progress(engine, name, *tokens):
    """Send the events of two steps for the request `name`: the first of `tokens`, then the others."""
    engine.send_tokens(name, *tokens[:1])
    engine.send_tokens(name, *tokens[1:])


async def test_only_the_request_that_engines_die_of_is_ended(client, engine):
    """Two deaths are charged to all requests. Then they are sent one by one, and the third death ends the one sent last."""
    streams = await make_suspects(client, engine, "first", "poison", "second")
    assert await engine.receive_ids(1) == ["first"]
    progress(engine, "first", 7, 8)
    assert await engine.receive_ids(1) == ["poison"]
    await engine.replace(client)
    with pytest.raises(InternalError, match="died 3 times"):
        await collect(streams["poison"])
    again = await engine.receive(Submit)  # "first" has progressed, so the death is not charged to it
    assert (again.request_id, outputs_of(again)) == ("first", [7, 8])
    engine.finish("first", 9)
    again = await engine.receive(Submit)
    assert (again.request_id, outputs_of(again)) == ("second", [])
    engine.finish("second", 9)
    assert await tokens_of(streams["first"]) == [7, 8, 9]
    assert await tokens_of(streams["second"]) == [9]


async def test_a_request_that_gets_one_token_from_each_engine_before_that_dies_is_found(client, engine):
    """Each engine computes the prompt and sends the first token, and then dies in the next step."""
    streams = {name: client.submit(request(name, max_tokens=20)) for name in ("poison", "other")}
    for life in range(2):
        await engine.receive_ids(2)
        engine.send_tokens("poison", life)
        await read_until(streams["poison"], 1)
        await engine.replace(client)
    assert await engine.receive_ids(1) == ["poison"]
    engine.send_tokens("poison", 2)
    await read_until(streams["poison"], 1)
    await engine.replace(client)
    with pytest.raises(InternalError, match="died 3 times"):
        await collect(streams["poison"])
    assert await engine.receive_ids(1) == ["other"]
    engine.finish("other", 7)
    assert await tokens_of(streams["other"]) == [7]


@pytest.mark.parametrize("urgent", [{"priority": -1}, {"slo": "interactive", "priority": 5}])
async def test_a_death_is_not_charged_to_streams_that_only_waited_in_the_queue(client, engine, urgent):
    """The engine runs at most 8 requests at a time. The most urgent request arrives last and runs first."""
    names = [f"r{number}" for number in range(9)]
    for name in [*names, "urgent"]:
        client.submit(msgspec.structs.replace(request(name), **(urgent if name == "urgent" else {})))
    for _ in range(2):
        assert await engine.receive_ids(10) == [*names, "urgent"]
        await engine.replace(client)
    # r0 to r6 and "urgent" ran, and are suspects now: only the first of them is sent.
    assert await engine.receive_ids(3) == ["r7", "r8", "r0"]
    await engine.receives_nothing_else(client)


class TestProgressIsInnocence:
    @pytest.mark.parametrize("num_deaths", [1, 3, 5])
    async def test_a_stream_that_progresses_between_deaths_is_never_charged(self, client, engine, num_deaths):
        """Something else kills the engines. The stream progresses on all but the last two engines, so it is not ended."""
        stream = client.submit(request(max_tokens=100))
        for life in range(num_deaths):
            await engine.receive(Submit)
            progress(engine, "r", 2 * life, 2 * life + 1)
            assert await read_until(stream, 2) == [2 * life, 2 * life + 1]
            await engine.replace(client)
        for _ in range(2):
            assert len(outputs_of(await engine.receive(Submit))) == 2 * num_deaths
            await engine.replace(client)
        assert outputs_of(await engine.receive(Submit)) == list(range(2 * num_deaths))
        engine.finish("r", 99)
        assert await tokens_of(stream) == [99]

    async def test_progress_on_a_successor_drops_earlier_charges(self, client, engine):
        streams = await make_suspects(client, engine, "first", "second")
        for name in ("first", "second"):  # each is sent alone, as a suspect
            assert await engine.receive_ids(1) == [name]
            progress(engine, name, 7, 8)
            await read_until(streams[name], 2)
        for _ in range(2):
            await engine.replace(client)
            assert await engine.receive_ids(2) == ["first", "second"]  # both are sent together, so neither is a suspect
        for name in ("first", "second"):
            engine.finish(name, 9)
            assert await tokens_of(streams[name]) == [9]

    async def test_it_counts_at_the_strictest_setting(self, engine):
        client = await strict_client(engine, max_deaths=1)
        stream = client.submit(request())
        await engine.receive(Submit)
        progress(engine, "r", 7, 8)
        await read_until(stream, 2)
        await engine.replace(client)
        assert outputs_of(await engine.receive(Submit)) == [7, 8]
        await client.close()


class TestStatusOfAnEndedStream:
    async def test_it_is_to_blame_if_it_was_alone(self, engine):
        client = await strict_client(engine, max_deaths=1)
        stream = client.submit(request())
        await engine.receive(Submit)
        await engine.replace(client)
        with pytest.raises(InternalError, match="died once"):
            await collect(stream)
        await client.close()

    async def test_engines_are_unavailable_if_several_requests_may_be_to_blame(self, engine):
        client = await strict_client(engine, max_deaths=1)
        streams = [client.submit(request(f"r{number}")) for number in range(3)]
        await engine.receive_ids(3)
        progress(engine, "r0", 7, 8)
        await read_until(streams[0], 2)
        await engine.replace(client)
        for stream in streams[1:]:
            with pytest.raises(EngineUnavailable, match="died once"):
                await collect(stream)
        assert await engine.receive_ids(1) == ["r0"]
        await client.close()

    async def test_engines_are_unavailable_if_they_also_die_without_the_request(self, client, engine):
        """The third death is not charged to the second request, which was not sent yet. So engines die of another cause."""
        streams = await make_suspects(client, engine, "first", "second")
        assert await engine.receive_ids(1) == ["first"]
        await engine.replace(client)
        with pytest.raises(InternalError, match="died 3 times"):
            await collect(streams["first"])
        assert await engine.receive_ids(1) == ["second"]
        await engine.replace(client)
        with pytest.raises(EngineUnavailable, match="died 3 times"):
            await collect(streams["second"])


class TestTheNextSuspectIsSent:
    async def test_when_the_one_before_it_is_aborted(self, client, engine):
        streams = await make_suspects(client, engine, "first", "second")
        assert await engine.receive_ids(1) == ["first"]
        streams["first"].abort()
        assert (await engine.receive(Abort)).request_ids == ["first"]
        assert await engine.receive_ids(1) == ["second"]

    async def test_when_the_one_before_it_ends_with_its_first_token(self, client, engine):
        await make_suspects(client, engine, "first", "second")
        assert await engine.receive_ids(1) == ["first"]
        engine.finish("first", 7)
        assert await engine.receive_ids(1) == ["second"]

    async def test_when_the_one_before_it_is_refused_for_good(self, client, engine):
        streams = await make_suspects(client, engine, "first", "second")
        assert await engine.receive_ids(1) == ["first"]
        engine.refuse("first", failure=RequestFailure("InvalidRequest", "refused"))
        with pytest.raises(Exception, match="refused"):
            await collect(streams["first"])
        assert await engine.receive_ids(1) == ["second"]

    async def test_when_the_one_before_it_has_to_be_sent_again(self, client, engine):
        """The engine's queue is full, so the suspects are sent in turn until the engine accepts one."""
        streams = await make_suspects(client, engine, "first", "second")
        for name in ("first", "second", "first"):
            assert await engine.receive_ids(1) == [name]
            engine.refuse(name)
        assert await engine.receive_ids(1) == ["second"]
        progress(engine, "second", 7, 8)
        assert await engine.receive_ids(1) == ["first"]
        for name in streams:
            engine.finish(name, 9)
        assert await tokens_of(streams["first"]) == [9]
        assert await tokens_of(streams["second"]) == [7, 8, 9]

    async def test_when_the_one_before_it_cannot_be_sent_again(self, client, engine, monkeypatch):
        """The engine refuses the first suspect and then reads nothing, so the client's queue to it is full at the retry."""
        monkeypatch.setattr(zmq_connection, "SEND_QUEUE", 4)
        streams = await make_suspects(client, engine, "first", "second", "third")
        assert await engine.receive_ids(1) == ["first"]
        await fill_send_queue(client)
        retries = count_calls(monkeypatch, client, "_retry")
        engine.refuse("first")
        await until(lambda: len(retries) >= 2, "a retry that could not be sent, and another one")
        left = set(streams)
        while left:
            (name,) = await engine.receive_ids(1)
            if name in left:
                left.remove(name)
                engine.finish(name, 7)
        for stream in streams.values():
            assert await tokens_of(stream) == [7]

    async def test_when_the_one_before_it_no_longer_fits_into_the_context(self, client, engine):
        first, second = client.submit(request("first", prompt=range(10))), client.submit(request("second"))
        await engine.receive_ids(2)
        await engine.replace(client)
        await engine.receive_ids(2)
        await engine.replace(client, max_model_len=10)
        with pytest.raises(ContextTooLong):
            await collect(first)
        assert await engine.receive_ids(1) == ["second"]
        engine.finish("second", 7)
        assert await tokens_of(second) == [7]

    async def test_when_the_engine_drops_this_worker(self, client, engine):
        await make_suspects(client, engine, "first", "second")
        assert await engine.receive_ids(1) == ["first"]
        engine.send(Welcome(client.info))
        await engine.accept()
        (name,) = await engine.receive_ids(1)
        engine.finish(name, 7)
        assert {name, *await engine.receive_ids(1)} == {"first", "second"}


async def strict_client(engine, *, max_deaths):
    client = engine_client([engine.endpoint], max_deaths=max_deaths)
    await client.start()
    await engine.accept()
    await client.wait_ready(5)
    return client
