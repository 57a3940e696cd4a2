"""Tests how requests are sent and recorded, with a client whose answers the test decides."""

import asyncio
import time

import pytest

from loadtest.drive import Driver, Share
from loadtest.plan import WARM_UP
from loadtest.record import Failure
from loadtest.spec import Sessions, Step, Target
from tests.unit.loadtest.samples import load

TARGET = Target("http://host", "generate", vocab=500)


class FakeClient:
    """Answers each call with `reply`, an async function that gets the call and the reading."""

    def __init__(self, reply):
        self.reply, self.calls, self.at_once, self.most = reply, [], 0, 0

    async def stream(self, call, reading):
        self.calls.append(call)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await self.reply(call, reading)
        finally:
            self.at_once -= 1

    async def close(self):
        pass


async def two_tokens(call, reading):
    await asyncio.sleep(0)
    reading.event(time.perf_counter(), 1)
    reading.event(time.perf_counter(), 1)
    reading.usage(len(call.prompt.ids), 2, 0)


async def never(call, reading):
    reading.event(time.perf_counter(), 1)
    await asyncio.Event().wait()


async def nothing(call, reading):
    pass


ALL = Share(0, 1)


async def drive(client, shape, share=ALL, after=None):
    driver = Driver(shape, TARGET, client, share)
    running = asyncio.create_task(driver.run(time.perf_counter() + shape.warm_up))
    if after is not None:
        await after(driver)
    await running
    assert driver.running == 0
    assert driver.sent == len(driver.records) == len(client.calls)
    return driver.records


FAST = load(steps=(Step(500, 500, 0.1), Step(1000, 1000, 0.1)), warm_up=0.05)


async def test_an_open_loop_sends_every_request_of_the_plan_once_and_never_early():
    shares = [await drive(FakeClient(two_tokens), FAST, Share(i, 3)) for i in range(3)]
    records = sorted((r for share in shares for r in share), key=lambda r: r.index)
    driver = Driver(FAST, TARGET, FakeClient(two_tokens), Share(0, 1))
    orders = driver.plan.open_loop()
    assert [(r.index, r.at, r.step) for r in records] == [(o.number, o.at, o.step) for o in orders]
    assert all(r.lag >= 0 for r in records)
    assert {r.step for r in records} == {WARM_UP, 0, 1}
    assert {(r.outcome, r.output_tokens, r.prompt_tokens, len(r.times)) for r in records} == {("ok", 2, 8, 2)}


async def test_a_closed_loop_has_its_number_of_requests_at_a_time():
    client = FakeClient(two_tokens)
    records = await drive(client, load(concurrency=4, requests=40))
    assert client.most == 4
    assert sorted(r.index for r in records) == list(range(40))


async def test_no_new_request_is_sent_after_the_time():
    records = await drive(FakeClient(two_tokens), load(concurrency=2, seconds=0.05, warm_up=0.02))
    assert all(r.at < 0.05 for r in records)
    assert {r.step for r in records} == {WARM_UP, 0}


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (Failure("429 overloaded", "busy", refused=True, retry_after=3.0), "refused"),
        (Failure("500 internal", "oops"), "failed"),
    ],
)
async def test_failures_are_recorded(failure, outcome):
    async def fail(call, reading):
        raise failure

    (record,) = await drive(FakeClient(fail), load(concurrency=1, requests=1))
    assert (record.outcome, record.status, record.detail) == (outcome, failure.status, failure.detail)
    assert record.retry_after == failure.retry_after


async def test_a_refusal_after_the_first_token_is_a_failure():
    async def late(call, reading):
        reading.event(time.perf_counter(), 1)
        raise Failure("503", refused=True)

    (record,) = await drive(FakeClient(late), load(concurrency=1, requests=1))
    assert record.outcome == "failed"


async def test_an_answer_without_a_token_is_a_failure():
    (record,) = await drive(FakeClient(nothing), load(concurrency=1, requests=1))
    assert (record.outcome, record.status) == ("failed", "no token")


async def test_a_cancelled_request_and_one_that_timed_out_differ():
    (record,) = await drive(FakeClient(never), load(concurrency=1, requests=1, cancel=1.0, cancel_after=(0.01, 0.01)))
    assert (record.outcome, record.output_tokens) == ("cancelled", 1)
    (record,) = await drive(FakeClient(never), load(concurrency=1, requests=1, timeout=0.01))
    assert (record.outcome, record.status) == ("failed", "timeout")


async def test_a_stopped_load_records_what_is_under_way_as_unfinished():
    client = FakeClient(never)

    async def stop(driver):
        while client.at_once < 3:  # noqa: ASYNC110 - no event says that the calls have begun
            await asyncio.sleep(0)
        driver.stop()

    records = await drive(client, load(concurrency=3, seconds=100), after=stop)
    assert [r.outcome for r in records] == ["unfinished"] * 3


AGENTS = Sessions(num=1, turns=6, context=300, think_s=0.0, fork=1.0, fork_turns=2)


async def test_a_session_and_its_forks_go_on_from_the_context():
    client = FakeClient(two_tokens)
    records = await drive(client, load(sessions=AGENTS, requests=1, seconds=60))
    main = [r for r in records if r.session == 0]
    assert [r.turn for r in main] == [0, 1, 2, 3, 4, 5]
    forks = {r.session for r in records} - {0}
    assert len(forks) == 4, "every turn but the first and the last one forks"
    for fork in forks:
        turns = [r.turn for r in records if r.session == fork]
        assert turns == [turns[0], turns[0] + 1]
    prompts = [call.prompt.ids.tolist() for call in client.calls]
    first = min(prompts, key=len)
    assert all(prompt[: len(first)] == first for prompt in prompts)


async def test_a_session_ends_at_a_failure():
    async def fail(call, reading):
        raise Failure("500")

    records = await drive(FakeClient(fail), load(sessions=AGENTS, requests=1, seconds=60))
    assert [(r.session, r.turn) for r in records] == [(0, 0)]
