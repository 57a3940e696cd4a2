"""Tests of GenerateService: the items that a call yields, and how the metrics count requests."""

import asyncio
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import (
    Aborted,
    EngineUnavailable,
    InvalidRequest,
    UnknownModel,
)
from engine.request import SEED_MAX, SEED_MIN, CachedTokens, FinishReason, TokenEvent, output_seed
from server.service.types import Chunk
from tests.support.local_engine import LocalEngine, LocalStream, until
from tests.unit.server.metrics.test_registry import samples
from tests.unit.server.service.calls import PROMPT, TEXT, counts, expected, outputs_of, request, service_over


async def test_one_output(service):
    [(tokens, text, last)], ending = await outputs_of(service, request(max_tokens=20, seed=5))
    assert tokens == expected(20, 5)
    assert text == TEXT.decode(tokens)
    assert (last.finish_reason, last.stop_reason) == ("length", None)
    assert (ending.usage.prompt_tokens, ending.usage.completion_tokens) == (3, 20)
    assert 0 <= ending.timing.queue_ms <= ending.timing.ttft_ms <= ending.timing.total_ms
    assert counts(service) == {"started": 1, "finished": 1, "aborted": 0, "failed": 0, "running": 0}


@pytest.mark.parametrize("seed", [7, SEED_MAX, -1, SEED_MIN])
async def test_the_outputs_of_a_call_have_independent_seeds(service, engine, seed):
    outputs, ending = await outputs_of(service, request(max_tokens=12, seed=seed, n=3))
    assert [tokens for tokens, _, _ in outputs] == [expected(12, output_seed(seed, i)) for i in range(3)]
    assert [submit.fork_of for submit in engine.submitted] == [None, "r", "r"]
    assert [submit.request_id for submit in engine.submitted] == ["r", "r-1", "r-2"]
    assert (ending.usage.prompt_tokens, ending.usage.completion_tokens) == (3, 36)


def test_neighbouring_seeds_have_no_outputs_in_common():
    """The first output has the client's own seed, so that n does not change it."""
    seeds = [output_seed(seed, index) for seed in range(-50, 50) for index in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert output_seed(7, 0) == 7


async def test_a_request_without_a_seed_gets_a_random_one(service, engine):
    await outputs_of(service, request(id="a"))
    await outputs_of(service, request(id="b"))
    assert engine.submitted[0].seed != engine.submitted[1].seed


async def test_a_repeated_prompt_is_found_in_the_prefix_cache(service):
    prompt = list(range(2, 66))
    await outputs_of(service, request(prompt, id="a"))
    _, ending = await outputs_of(service, request(prompt, id="b"))
    assert ending.usage.cached == CachedTokens(gpu=48)
    assert samples(service._metrics)["tidegate_cached_tokens_total", ()] == 48


@pytest.mark.parametrize("n", [1, 3])
async def test_the_cached_tokens_of_a_call_are_those_of_its_prompt_and_not_of_its_other_outputs(service, n):
    prompt = list(range(2, 66))
    for id, cached in (("a", 0), ("b", 48)):
        _, ending = await outputs_of(service, request(prompt, id=id, n=n))
        assert (ending.usage.prompt_tokens, ending.usage.cached) == (64, CachedTokens(gpu=cached))
    found = samples(service._metrics)
    assert found["tidegate_prompt_tokens_total", ()] == 128
    assert found["tidegate_cached_tokens_total", ()] == 48


class SilentEngine(LocalEngine):
    """An engine whose events come from the test."""

    def submit(self, submit):
        self._streams[submit.request_id] = LocalStream(self, submit.request_id)
        return self._streams[submit.request_id]

    def send(self, request_id, cached):
        self._deliver(TokenEvent(request_id, [5], FinishReason.LENGTH, cached=cached, queue_s=0.0))


async def test_the_cached_tokens_of_a_call_come_from_its_first_output_whichever_begins_first():
    engine = SilentEngine()
    service = service_over(engine)
    stream = service.generate(request(n=2))
    first = asyncio.ensure_future(anext(stream))
    await until(lambda: len(engine._streams) == 2)
    engine.send("r-1", CachedTokens(gpu=2))
    assert (await first).index == 1
    engine.send("r", CachedTokens(host=1))
    rest = [item async for item in stream]
    assert rest[-1].usage.cached == CachedTokens(host=1)
    assert samples(service._metrics)["tidegate_cached_tokens_total", ()] == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 30), st.integers(1, 6), st.integers(0, 1000))
def test_a_stop_string_ends_the_output_at_its_first_occurrence(start, length, seed):
    async def check():
        async with LocalEngine() as engine:
            service = service_over(engine)
            ids = expected(60, seed)
            whole, said = TEXT.decode(ids), TEXT.decode(ids, skip_special_tokens=False)
            stop = whole[start : start + length]
            if not stop or "\ufffd" in stop or said.count(stop) != whole.count(stop):
                return  # in the text of hidden special tokens a stop string ends an output too: test_shown_text.py
            [(tokens, text, last)], ending = await outputs_of(service, request(max_tokens=60, seed=seed, stop=(stop,)))
            assert text == whole[: whole.find(stop)]
            assert (last.finish_reason, last.stop_reason) == ("stop", stop)
            assert stop in TEXT.decode(tokens)
            assert stop not in TEXT.decode(tokens[:-1])
            assert ending.usage.completion_tokens == len(tokens)
            assert counts(service)["finished"] == 1

    asyncio.run(check())


async def test_a_stop_string_aborts_the_request_in_the_engine(service, engine):
    stop = next(c for c in TEXT.decode(expected(400, 3)[2:9]) if c != "\ufffd")
    await outputs_of(service, request(max_tokens=400, seed=3, stop=(stop,)))
    assert engine.aborted == ["r"]
    assert engine.core.stats().num_aborted == 1


async def test_no_stop_string_ends_an_output_before_min_tokens(service):
    stop = TEXT.token_text(expected(5, 3)[1])
    [(tokens, _, _)], _ = await outputs_of(service, request(max_tokens=5, min_tokens=4, seed=3, stop=(stop,)))
    assert len(tokens) >= 4


async def test_one_output_may_stop_before_the_others(service):
    alone = [TEXT.decode(expected(30, output_seed(11, i))) for i in range(2)]
    stop = next(c for c in alone[0] if c not in alone[1] and c != "\ufffd")
    outputs, ending = await outputs_of(service, request(max_tokens=30, seed=11, n=2, stop=(stop,)))
    assert [last.finish_reason for _, _, last in outputs] == ["stop", "length"]
    assert outputs[1][1] == alone[1]
    assert ending.usage.completion_tokens == len(outputs[0][0]) + 30


async def test_a_stop_token_is_counted_and_reported_but_has_no_text(service):
    whole = expected(20, 5)
    at = next(i for i in range(3, 20) if whole[i] not in whole[:i])
    [(tokens, text, last)], _ = await outputs_of(service, request(max_tokens=20, seed=5, stop_token_ids=(whole[at],)))
    assert tokens == whole[: at + 1]
    assert text == TEXT.decode(whole[:at])
    assert (last.finish_reason, last.stop_reason) == ("stop", whole[at])


async def test_there_is_one_logprob_for_each_token(service):
    chunks = [c async for c in service.generate(request(max_tokens=5, logprobs=2, prompt_logprobs=0)) if isinstance(c, Chunk)]
    assert all([lp.token for lp in chunk.logprobs] == chunk.token_ids for chunk in chunks)
    assert [len(c.prompt_logprobs) for c in chunks if c.prompt_logprobs is not None] == [3]


@pytest.mark.parametrize("n", [1, 3])
async def test_a_prompts_logprobs_come_once(service, engine, n):
    items = [item async for item in service.generate(request(max_tokens=2, n=n, prompt_logprobs=2, logprobs=1))]
    with_prompt = [item for item in items if isinstance(item, Chunk) and item.prompt_logprobs is not None]
    assert [(chunk.index, len(chunk.prompt_logprobs)) for chunk in with_prompt] == [(0, len(PROMPT))]
    assert [submit.params.prompt_logprobs for submit in engine.submitted] == [2] + [None] * (n - 1)
    assert {submit.params.logprobs for submit in engine.submitted} == {1}


async def test_several_greedy_outputs_are_allowed(service):
    outputs, _ = await outputs_of(service, request(n=2, temperature=0.0, max_tokens=3))
    assert len(outputs) == 2


async def test_the_served_model_and_an_unknown_one(service):
    [model] = service.models()
    assert (model.id, model.max_model_len) == ("tiny", 512)
    with pytest.raises(UnknownModel):
        await service.tokenize("x", model="other")
    with pytest.raises(InvalidRequest):
        await service.detokenize([512])


ACTS = st.sampled_from(["start", "read", "close", "abort", "bad", "lost"])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(ACTS, st.integers(0, 9)), max_size=40))
def test_request_counters_balance_in_any_order_of_events(acts):
    async def read(stream):
        with contextlib.suppress(Aborted, InvalidRequest, EngineUnavailable):
            await anext(stream, None)

    async def check():
        async with LocalEngine() as engine:
            service, streams = service_over(engine), []
            for i, (act, which) in enumerate(acts):
                if act == "start" or not streams:
                    streams.append(service.generate(request(id=f"r{i}", n=1 + which % 3, max_tokens=1 + which)))
                elif act == "read":
                    await read(streams[which % len(streams)])
                elif act == "close":
                    await streams.pop(which % len(streams)).aclose()
                elif act == "abort":
                    service.abort(f"r{which}")
                elif act == "bad":
                    await read(service.generate(request([], id="bad")))
                else:
                    engine.fail(EngineUnavailable("the engine died"))
                # A call counts as finished when it yields its Ending; num_running drops after that.
                assert counts(service)["running"] <= service.num_running
            for stream in streams:
                await stream.aclose()
            assert counts(service)["running"] == service.num_running == 0

    asyncio.run(check())
