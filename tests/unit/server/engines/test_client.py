"""Tests of EngineClient with one engine: streams, deaths, restarts and refusals.

test_several_engines.py and test_suspects.py test EngineClient too.
"""

import msgspec
import pytest

from engine.errors import ContextTooLong, EngineUnavailable, InternalError, Overloaded
from engine.messages import Abort, EngineStats, Heartbeat, StepEvents, Submit, Welcome
from engine.request import CachedTokens, FinishReason, RequestFailure, TokenEvent
from server.engines import zmq_connection
from tests.support.engine_client import engine_client
from tests.unit.server.engines.scripted_engine import (
    collect,
    count_calls,
    fill_send_queue,
    next_event,
    outputs_of,
    read_until,
    request,
    tokens_of,
    until,
)


async def death_noticed(client):
    await until(lambda: not client.health.ready, "the client notices the death")


async def test_a_resumed_stream_sends_the_tokens_it_has_and_reports_nothing_twice(client, engine):
    stream = client.submit(request(prompt_logprobs=0))
    assert (await engine.receive(Submit)).fork_of == "s"
    engine.send_tokens("r", 7, cached=CachedTokens(host=2), queue_s=0.1, prompt_logprobs=[None])
    first = await next_event(stream)
    assert (first.tokens, first.cached, first.prompt_logprobs) == ([7], CachedTokens(host=2), [None])
    await engine.replace(client)
    again = await engine.receive(Submit)
    assert (outputs_of(again), again.fork_of, again.params.prompt_logprobs, again.seed) == ([7], None, None, 1)
    engine.send_tokens("r", 8, cached=CachedTokens(gpu=3), queue_s=0.2)
    engine.finish("r", 9)
    rest = await collect(stream)
    assert [token for event in rest for token in event.tokens] == [8, 9]
    assert all(event.cached is None and event.queue_s is None for event in rest)
    assert client.health.restarts == 1


async def test_a_resumed_stream_has_the_deadline_that_is_left_and_is_not_refused_by_prediction(engine):
    now = [5.0]
    client = engine_client([engine.endpoint], clock=lambda: now[0], resume_timeout_s=30)
    await client.start()
    await engine.accept()
    await client.wait_ready(5)
    sent = msgspec.structs.replace(request(), slo="interactive", promised=True, deadline_s=8.0, tenant="t")
    stream = client.submit(sent)
    assert await engine.receive(Submit) == sent
    now[0] += 3.0
    await engine.replace(client)
    again = await engine.receive(Submit)
    assert (again.deadline_s, again.promised, again.resumed, again.slo, again.tenant) == (5.0, False, True, "interactive", "t")
    engine.send_tokens("r", 7)
    await next_event(stream)
    now[0] += 60.0
    await engine.replace(client)
    again = await engine.receive(Submit)
    assert 0 < again.deadline_s < 0.1  # the call that owns the stream ends it
    assert (outputs_of(again), again.promised, again.resumed) == ([7], False, True)
    engine.finish("r", 8, 9)
    assert await tokens_of(stream) == [8, 9]
    await client.close()


async def test_a_stream_that_waited_for_its_first_engine_may_still_be_refused(client, engine):
    engine.die()
    await death_noticed(client)
    stream = client.submit(msgspec.structs.replace(request(), promised=True))
    engine.start()
    await engine.accept()
    submit = await engine.receive(Submit)
    assert (submit.promised, submit.resumed) == (True, False)
    engine.refuse("r", RequestFailure("Overloaded", "the first token would come late", "slo_class", 4))
    with pytest.raises(Overloaded, match="late") as caught:
        await collect(stream)
    assert (caught.value.retry_after, caught.value.param) == (4, "slo_class")


async def test_an_engine_that_prepares_may_be_silent(engine):
    now = [0.0]
    client = engine_client([engine.endpoint], clock=lambda: now[0])
    await client.start()
    await engine.accept()
    await client.wait_ready(5)
    engine.send(Heartbeat(EngineStats(step=1), preparing=True))
    await until(lambda: client.health.stats == EngineStats(step=1), "a heartbeat")
    now[0] += 10.0
    assert client.health.ready
    engine.send(Heartbeat(EngineStats(step=2)))
    await until(lambda: client.health.stats == EngineStats(step=2), "another heartbeat")
    now[0] += 10.0
    assert "heartbeat" in client.health.reason
    await client.close()


async def test_a_second_welcome_leads_to_a_new_connection(client, engine):
    """An engine sends a second Welcome to a worker that it has dropped."""
    stream = client.submit(request(max_tokens=1))
    await engine.receive(Submit)
    engine.send(Welcome(client.info))
    await engine.accept()
    await engine.receive(Submit)
    engine.finish("r", 7, finish=FinishReason.STOP)
    assert (await collect(stream))[0].finish is FinishReason.STOP


async def test_a_full_queue_refuses_new_requests_and_not_resumed_ones(client, engine):
    fresh, old = client.submit(request("fresh")), client.submit(request("old", max_tokens=1))
    await engine.receive_ids(2)
    engine.refuse("fresh")
    with pytest.raises(Overloaded, match="queue is full"):
        await collect(fresh)
    await engine.replace(client)
    for _ in range(2):
        assert await engine.receive_ids(1) == ["old"]
        engine.refuse("old")
    await engine.receive(Submit)
    engine.finish("old", 7)
    assert await tokens_of(old) == [7]


async def test_a_resumed_stream_waits_while_it_cannot_be_sent(client, engine, monkeypatch):
    """The new engine reads nothing for a while, so the client's queue of messages to it is full."""
    old = client.submit(request("old", max_tokens=1))
    await engine.receive(Submit)
    monkeypatch.setattr(zmq_connection, "SEND_QUEUE", 4)
    await engine.replace(client)
    await engine.receive(Submit)
    num_fillers = await fill_send_queue(client)
    retries = count_calls(monkeypatch, client, "_retry")
    engine.refuse("old")
    await until(lambda: len(retries) >= 2, "a retry that could not be sent, and another one")
    assert (await engine.receive_ids(num_fillers + 1))[-1] == "old"
    engine.finish("old", 7)
    assert await tokens_of(old) == [7]


async def test_messages_that_cannot_be_read_and_events_of_unknown_requests_are_dropped(client, engine):
    stream = client.submit(request(max_tokens=1))
    await engine.receive(Submit)
    engine.send_raw(b"\xc1rubbish")
    engine.send(StepEvents([TokenEvent("nobody", [1], FinishReason.LENGTH), TokenEvent("r", [7], FinishReason.LENGTH)]))
    assert await tokens_of(stream) == [7]


async def test_a_fast_engine_leaves_the_event_loop_to_other_tasks(client, engine, monkeypatch):
    """The client stops reading after each message (READ_SECONDS is 0), so the stream's consumer runs between two messages.

    Events that wait for their consumer are merged, so an event with many tokens would show that the consumer did not run.
    """
    monkeypatch.setattr(zmq_connection, "READ_SECONDS", 0.0)
    stream = client.submit(request(max_tokens=50))
    await engine.receive(Submit)
    for token in range(50):
        engine.send_tokens("r", token, finish=FinishReason.LENGTH if token == 49 else None)
    events = [event.tokens async for event in stream]
    assert [token for tokens in events for token in tokens] == list(range(50))
    assert max(map(len, events)) <= 2  # the consumer runs at the latest after the next message


async def test_abort_reaches_the_engine_once(client, engine):
    stream = client.submit(request())
    await engine.receive(Submit)
    stream.abort()
    stream.abort()
    assert (await engine.receive(Abort)).request_ids == ["r"]
    await engine.receives_nothing_else(client)


@pytest.fixture
def small_send_queue(monkeypatch):
    monkeypatch.setattr(zmq_connection, "SEND_QUEUE", 4)


@pytest.mark.usefixtures("small_send_queue")
async def test_an_abort_that_cannot_be_sent_is_sent_later_and_before_any_new_request(client, engine):
    stream = client.submit(request())
    await engine.receive(Submit)
    num_fillers = await fill_send_queue(client)
    stream.abort()
    await engine.receive_ids(num_fillers)
    client.submit(request())  # a new request with the same id
    assert (await engine.receive(Abort)).request_ids == ["r"]
    assert await engine.receive_ids(1) == ["r"]


@pytest.mark.usefixtures("small_send_queue")
async def test_a_queue_that_has_space_again_takes_the_next_request_at_once(client, engine):
    """The last refusal was less than a millisecond ago in most rounds."""
    for _ in range(8):
        num_fillers = await fill_send_queue(client)
        with pytest.raises(Overloaded):
            client.submit(request("refused", prompt=tuple(range(100, 400)) * 300))
        await engine.receive_ids(num_fillers)
        client.submit(request("next"))
        assert await engine.receive_ids(1) == ["next"]
        for name in list(client._streams):
            engine.finish(name, 7)
        await until(lambda: client.num_streams == 0, "all streams have ended")


async def test_an_aborted_stream_is_not_resumed(client, engine):
    stream = client.submit(request())
    await engine.receive(Submit)
    engine.die()
    stream.abort()
    engine.start()
    await engine.accept()
    await engine.receives_nothing_else(client)


async def test_no_request_is_accepted_before_the_first_engine_connects(tmp_path):
    client = engine_client([f"ipc://{tmp_path}/nobody"])
    await client.start()
    with pytest.raises(EngineUnavailable):
        client.submit(request())
    with pytest.raises(EngineUnavailable):
        _ = client.info
    with pytest.raises(EngineUnavailable):
        await client.wait_ready(0.05)
    assert (client.health.ready, client.health.started, client.health.reason) == (False, False, "the engine is still starting")
    await client.close()


async def test_draining_ends_readiness_and_closing_ends_the_streams(client, engine):
    stream = client.submit(request())
    client.drain()
    assert (client.health.ready, client.health.reason) == (False, "the server is shutting down")
    await client.close()
    with pytest.raises(EngineUnavailable, match="shutting down"):
        await next_event(stream)
    with pytest.raises(EngineUnavailable, match="shutting down"):
        client.submit(request("late"))


async def test_two_requests_under_way_cannot_have_one_id(client):
    client.submit(request())
    with pytest.raises(InternalError, match="under way already"):
        client.submit(request())


async def test_a_request_that_arrives_while_the_engine_restarts_waits_for_it(client, engine):
    engine.die()
    await death_noticed(client)
    stream = client.submit(request(prompt_logprobs=0))
    client.submit(request("aborted")).abort()
    engine.start()
    await engine.accept()
    sent = await engine.receive(Submit)
    assert (sent.request_id, sent.fork_of, outputs_of(sent), sent.params.prompt_logprobs) == ("r", "s", [], 0)
    engine.send_tokens("r", 7, finish=FinishReason.LENGTH, cached=CachedTokens())
    assert [(event.tokens, event.cached) for event in await collect(stream)] == [([7], CachedTokens())]
    await engine.receives_nothing_else(client)


async def test_the_number_of_requests_that_wait_for_the_engine_is_bounded(client, engine):
    engine.die()
    await death_noticed(client)
    for number in range(10):  # max_num_seqs is 8 and max_queue is 2, so 10 requests may wait
        client.submit(request(f"r{number}"))
    with pytest.raises(Overloaded, match="restarting"):
        client.submit(request("one more"))


async def test_the_prompts_that_wait_for_the_engine_are_bounded_together(engine):
    client = engine_client([engine.endpoint], resume_timeout_s=30, max_queue_tokens=10)
    await client.start()
    await engine.accept()
    await client.wait_ready(5)
    client.submit(request("old", prompt=range(100)))  # it was accepted before, and does not count
    await engine.receive(Submit)
    engine.die()
    await death_noticed(client)
    client.submit(request("large", prompt=range(5, 17))).abort()  # nothing else waits
    client.submit(request("a", prompt=range(5, 11)))
    client.submit(request("b", prompt=range(5, 9)))
    with pytest.raises(Overloaded, match="restarting, and 3 requests with 10 tokens are already waiting"):
        client.submit(request("c", prompt=(5,)))
    await client.close()


async def test_a_flood_while_the_engine_restarts_leaves_room_to_other_tenants(engine):
    client = engine_client([engine.endpoint], resume_timeout_s=30, max_queue=100)
    await client.start()
    await engine.accept()
    await client.wait_ready(5)
    client.submit(request("early", tenant="calm")).abort()
    engine.die()
    await death_noticed(client)
    for number in range(96):  # max_num_seqs is 8, so 108 requests may wait
        client.submit(request(f"r{number}", tenant="flood"))
    with pytest.raises(Overloaded, match="of this tenant are already waiting, and the rest of the queue is for others"):
        client.submit(request("one more", tenant="flood"))
    for number in range(5):
        client.submit(request(f"calm{number}", tenant="calm"))
    await client.close()


async def test_streams_end_if_no_engine_comes_back_in_time(engine):
    client = engine_client([engine.endpoint], resume_timeout_s=0.2)
    await client.start()
    await engine.accept()
    await client.wait_ready(5)
    engine.die()
    await death_noticed(client)
    stream = client.submit(request())
    with pytest.raises(EngineUnavailable, match="none took its place"):
        await collect(stream)
    with pytest.raises(EngineUnavailable, match="restarting"):
        client.submit(request())
    engine.start()
    await engine.accept()
    await until(lambda: client.health.ready, "the engine is back")
    client.submit(request())
    assert await engine.receive_ids(1) == ["r"]
    await client.close()


async def test_no_request_waits_for_an_engine_while_the_worker_drains(client, engine):
    client.drain()
    engine.die()
    await until(lambda: not client._live_links(), "the client notices the death")
    with pytest.raises(EngineUnavailable, match="shutting down"):
        client.submit(request())


class TestSmallerContext:
    """Tests of streams whose engine restarts with a smaller context, since less memory was free then."""

    @pytest.mark.parametrize("received", [0, 1, 3], ids=["nothing received", "one token", "several tokens"])
    async def test_a_stream_that_still_fits_is_resumed_as_it_was(self, client, engine, received):
        stream = client.submit(request(max_tokens=8))
        await engine.receive(Submit)
        for token in range(received):
            engine.send_tokens("r", token)
        assert await read_until(stream, received) == list(range(received))
        await engine.replace(client, max_model_len=10)  # 2 tokens of prompt and 8 of output
        again = await engine.receive(Submit)
        assert (outputs_of(again), again.params.max_tokens) == (list(range(received)), 8)
        engine.finish("r", 9)
        assert await tokens_of(stream) == [9]

    @pytest.mark.parametrize("received", [0, 1, 3], ids=["nothing received", "one token", "several tokens"])
    async def test_a_stream_that_no_longer_fits_runs_to_the_end_of_the_context_and_says_why_it_ends(
        self, client, engine, received
    ):
        stream = client.submit(request(max_tokens=8, min_tokens=7))
        await engine.receive(Submit)
        for token in range(received):
            engine.send_tokens("r", token)
        await read_until(stream, received)
        await engine.replace(client, max_model_len=6)
        again = await engine.receive(Submit)
        assert (outputs_of(again), again.params.max_tokens, again.params.min_tokens) == (list(range(received)), 4, 4)
        engine.finish("r", *range(received, 4))
        assert await read_until(stream, 4 - received) == list(range(received, 4))
        with pytest.raises(ContextTooLong, match=r"context of 6 tokens .* needs 10 \(prompt 2, max_tokens 8\)"):
            await next_event(stream)
        assert client.num_streams == 0

    async def test_a_stream_that_no_longer_fits_may_still_stop_by_itself(self, client, engine):
        stream = client.submit(request(max_tokens=8))
        await engine.receive(Submit)
        await engine.replace(client, max_model_len=6)
        await engine.receive(Submit)
        engine.finish("r", 7, 1, finish=FinishReason.STOP)
        assert [(event.tokens, event.finish) for event in await collect(stream)] == [([7, 1], FinishReason.STOP)]

    @pytest.mark.parametrize(("max_model_len", "param"), [(2, "prompt"), (1, "prompt"), (5, "max_tokens"), (4, "max_tokens")])
    async def test_a_stream_with_no_token_left_in_the_context_ends_and_says_why(self, client, engine, max_model_len, param):
        """The stream has a prompt of 2 tokens and has received 3 tokens. Another stream is not affected."""
        stream, other = client.submit(request(max_tokens=8)), client.submit(request("other", max_tokens=1, prompt=[5]))
        await engine.receive_ids(2)
        engine.send_tokens("r", 7, 8, 9)
        assert await read_until(stream, 3) == [7, 8, 9]
        await engine.replace(client, max_model_len=max_model_len)
        with pytest.raises(ContextTooLong, match=f"context of {max_model_len} tokens") as caught:
            await next_event(stream)
        assert caught.value.param == param
        if max_model_len > 1:
            assert await engine.receive_ids(1) == ["other"]
            engine.finish("other", 7)
            assert await tokens_of(other) == [7]

    async def test_a_stream_gets_all_of_its_tokens_if_a_third_engine_has_the_full_context_again(self, client, engine):
        stream = client.submit(request(max_tokens=8))
        await engine.receive(Submit)
        await engine.replace(client, max_model_len=6)
        assert (await engine.receive(Submit)).params.max_tokens == 4
        await engine.replace(client, max_model_len=512)
        assert (await engine.receive(Submit)).params.max_tokens == 8
        engine.finish("r", *range(8))
        assert (await collect(stream))[-1].finish is FinishReason.LENGTH

    async def test_a_new_request_that_does_not_fit_is_for_the_engine_to_refuse(self, client, engine):
        await engine.replace(client, max_model_len=6)
        await until(lambda: client.info.limits.max_model_len == 6, "the new engine is live")
        client.submit(request(max_tokens=8))
        assert (await engine.receive(Submit)).params.max_tokens == 8
