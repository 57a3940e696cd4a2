import asyncio
import contextlib
import threading
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import (
    Aborted,
    ContextTooLong,
    EngineUnavailable,
    InternalError,
    InvalidRequest,
    Overloaded,
    RequestTimeout,
    UnknownModel,
)
from engine.fake import expected_tokens
from engine.request import SEED_MAX, SamplingParams, TokenEvent
from server.metrics import Metrics
from server.service import call as call_module
from server.service import text_work
from server.service.service import GenerateService
from server.service.types import ANONYMOUS, Chunk, Ending, GenerationRequest, Identity
from server.settings import Settings
from server.text.chat import ChatTemplate
from server.text.tokenizer import Tokenizer
from tests.support.local_engine import LIMITS, LocalEngine, until
from tests.support.tiny_checkpoint import CHAT_TEMPLATE, tiny_tokenizer
from tests.unit.server.test_metrics import conserved, samples, total

TEXT = Tokenizer(tiny_tokenizer(), chat=ChatTemplate(CHAT_TEMPLATE, {"bos_token": "<|begin|>", "eos_token": "<|end|>"}))
SETTINGS = Settings(served_model_name="tiny", max_n=4)
PROMPT = [7, 8, 9]


@pytest.fixture
async def engine():
    async with LocalEngine() as engine:
        yield engine
        engine.resume()
        await until(lambda: engine.idle)  # whatever a test did, the engine must end up without requests


@pytest.fixture
def service(engine):
    return service_over(engine)


def service_over(engine):
    return GenerateService(engine, TEXT, SETTINGS, Metrics("tiny", lambda: engine.health))


def request(prompt=PROMPT, id="r", n=1, stop=(), model=None, deadline_s=None, **params):
    params.setdefault("ignore_eos", True)
    return GenerationRequest(
        request_id=id, prompt=prompt, params=SamplingParams(**params), n=n, stop=stop, model=model, deadline_s=deadline_s
    )


async def outputs_of(service, sent, identity=ANONYMOUS):
    """Tokens, text and last chunk of each output, and the Ending. There must be one Ending, as the last item."""
    items = [item async for item in service.generate(sent, identity)]
    endings = [item for item in items if isinstance(item, Ending)]
    assert len(endings) == 1
    assert items[-1] is endings[0]
    outputs = []
    for index in range(sent.n):
        chunks = [item for item in items[:-1] if item.index == index]
        assert [chunk.finish_reason is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        tokens = [token for chunk in chunks for token in chunk.token_ids]
        outputs.append((tokens, "".join(chunk.text for chunk in chunks), chunks[-1]))
    return outputs, endings[0]


def expected(num, seed, prompt=PROMPT):
    return expected_tokens(prompt, num, SamplingParams(ignore_eos=True, max_tokens=num), seed, LIMITS)


def counts(service):
    found = samples(service._metrics)
    assert conserved(found)
    ends = {end: total(found, f"tidegate_requests_{end}_total") for end in ("started", "finished", "aborted", "failed")}
    return ends | {"running": total(found, "tidegate_requests_running")}


async def test_one_output(service):
    [(tokens, text, last)], ending = await outputs_of(service, request(max_tokens=20, seed=5))
    assert tokens == expected(20, 5)
    assert text == TEXT.decode(tokens)
    assert (last.finish_reason, last.stop_reason) == ("length", None)
    assert (ending.usage.prompt_tokens, ending.usage.completion_tokens) == (3, 20)
    assert 0 <= ending.timing.queue_ms <= ending.timing.ttft_ms <= ending.timing.total_ms
    assert counts(service) == {"started": 1, "finished": 1, "aborted": 0, "failed": 0, "running": 0}


async def test_output_i_of_n_samples_with_seed_plus_i(service, engine):
    outputs, ending = await outputs_of(service, request(max_tokens=12, seed=SEED_MAX, n=3))
    assert [tokens for tokens, _, _ in outputs] == [expected(12, seed) for seed in (SEED_MAX, 0, 1)]
    assert [submit.fork_of for submit in engine.submitted] == [None, "r", "r"]
    assert [submit.request_id for submit in engine.submitted] == ["r", "r-1", "r-2"]
    assert (ending.usage.prompt_tokens, ending.usage.completion_tokens) == (3, 36)


async def test_a_request_without_a_seed_gets_a_random_one(service, engine):
    await outputs_of(service, request(id="a"))
    await outputs_of(service, request(id="b"))
    assert engine.submitted[0].seed != engine.submitted[1].seed


async def test_a_repeated_prompt_is_found_in_the_prefix_cache(service):
    prompt = list(range(2, 66))
    await outputs_of(service, request(prompt, id="a"))
    _, ending = await outputs_of(service, request(prompt, id="b"))
    assert ending.usage.cached_tokens == 48
    assert samples(service._metrics)["tidegate_cached_tokens_total", ()] == 48


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 30), st.integers(1, 6), st.integers(0, 1000))
def test_a_stop_string_ends_the_output_at_its_first_occurrence(start, length, seed):
    async def check():
        async with LocalEngine() as engine:
            service = service_over(engine)
            whole = TEXT.decode(expected(60, seed))
            stop = whole[start : start + length]
            if not stop or "\ufffd" in stop:
                return
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
    alone = [TEXT.decode(expected(30, seed)) for seed in (11, 12)]
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


@pytest.mark.parametrize(
    ("fits", "too_many", "param"),
    [
        ({"prompt_logprobs": 3}, {"prompt_logprobs": 4}, "prompt_logprobs"),
        ({"logprobs": 4, "max_tokens": 5, "n": 4}, {"logprobs": 4, "max_tokens": 6, "n": 4}, "logprobs"),
    ],
)
async def test_log_probabilities_of_one_answer_are_bounded(engine, fits, too_many, param):
    limits = Settings(served_model_name="tiny", max_n=4, max_prompt_logprobs=4 * len(PROMPT), max_logprobs=100)
    service = GenerateService(engine, TEXT, limits, Metrics("tiny", lambda: engine.health))
    await outputs_of(service, request(**fits))
    with pytest.raises(InvalidRequest, match="at most") as caught:
        await outputs_of(service, request(**too_many))
    assert caught.value.param == param


@pytest.mark.parametrize(("n", "num_prompts"), [(1, 1), (3, 1), (1, 8)])
async def test_a_call_whose_client_does_not_read_is_ended(service, engine, monkeypatch, n, num_prompts):
    """The unread events are dropped at once. The client gets the error when it reads again."""
    monkeypatch.setattr(call_module, "UNREAD_LIMIT", 600)
    monkeypatch.setattr(call_module, "UNREAD_SECONDS", 0.01)
    sent = msgspec.structs.replace(request(max_tokens=400, n=n, logprobs=5), num_prompts=num_prompts)
    async with contextlib.aclosing(service.generate(sent)) as stream:
        await anext(stream)
        await until(lambda: len(engine.aborted) == n or engine.idle)
        assert all(held.unread == 0 for held in service._calls["r"]._streams.values())
        with pytest.raises(RequestTimeout, match="does not read"):
            await anext(stream)
    assert counts(service)["failed"] == 1


@pytest.mark.parametrize("n", [1, 3])
async def test_falling_behind_once_is_no_reason_to_end_a_call(service, engine, monkeypatch, n):
    """After a pause of the event loop the events of every call have arrived together."""
    monkeypatch.setattr(call_module, "UNREAD_LIMIT", 100)
    monkeypatch.setattr(call_module, "UNREAD_SECONDS", 60)
    stream = service.generate(request(max_tokens=400, n=n))
    num_tokens = len((await anext(stream)).token_ids)
    await until(lambda: engine.idle)
    call = service._calls["r"]
    assert sum(held.unread for held in call._streams.values()) > 100
    call._check_unread()
    async for item in stream:
        if isinstance(item, Chunk):
            num_tokens += len(item.token_ids)
    assert num_tokens == n * 400


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": [1, 512]}, "messages", "^messages has token id 512"),
        ({"max_tokens": 510}, "max_completion_tokens", "the prompt's 3 tokens"),
        ({"prompt": [7] * 600}, "messages", "the prompt has 600 tokens"),
        ({"n": 5}, "n", "n is 5"),
    ],
)
async def test_errors_name_fields_as_the_client_does(service, fields, param, message):
    names = {"prompt": "messages", "max_tokens": "max_completion_tokens"}
    with pytest.raises(InvalidRequest, match=message) as caught:
        await outputs_of(service, msgspec.structs.replace(request(**fields), client_names=names))
    assert caught.value.param == param


async def test_text_is_tokenised_with_and_without_special_tokens(service, engine):
    await outputs_of(service, request("Hello", id="a"))
    ids = await service.tokenize("Hello")
    assert engine.submitted[0].prompt == ids == [0, *await service.tokenize("Hello", add_special_tokens=False)]
    assert await service.detokenize(ids) == "Hello"


BAD = {
    "model": (UnknownModel, {"model": "other"}, "model"),
    "no text": (InvalidRequest, {"prompt": ""}, "prompt"),
    "no tokens": (InvalidRequest, {"prompt": []}, "prompt"),
    "surrogate": (InvalidRequest, {"prompt": "a\ud800"}, "prompt"),
    "negative id": (InvalidRequest, {"prompt": [-1]}, "prompt"),
    "unknown id": (InvalidRequest, {"prompt": [512]}, "prompt"),
    "long prompt": (ContextTooLong, {"prompt": [5] * 600}, "prompt"),
    "long together": (ContextTooLong, {"prompt": [5] * 500, "max_tokens": 13}, "max_tokens"),
    "n of 0": (InvalidRequest, {"n": 0}, "n"),
    "n of 5": (InvalidRequest, {"n": 5}, "n"),
    "empty stop": (InvalidRequest, {"stop": ("a", "")}, "stop"),
    "many stops": (InvalidRequest, {"stop": ("a",) * 17}, "stop"),
    "long stop": (InvalidRequest, {"stop": ("a" * 257,)}, "stop"),
    "stop with a surrogate": (InvalidRequest, {"stop": ("\udc00",)}, "stop"),
    "bias": (InvalidRequest, {"logit_bias": {512: 1.0}}, "logit_bias"),
    "stop token": (InvalidRequest, {"stop_token_ids": (512,)}, "stop_token_ids"),
    "deadline": (InvalidRequest, {"deadline_s": 0.0}, "deadline_ms"),
}


@pytest.mark.parametrize(("error", "fields", "param"), BAD.values(), ids=BAD)
async def test_validation_names_the_field(service, engine, error, fields, param):
    with pytest.raises(error) as caught:
        await outputs_of(service, request(**fields))
    assert type(caught.value) is error
    assert caught.value.param == param
    assert not engine.submitted
    assert counts(service) == {"started": 1, "finished": 0, "aborted": 0, "failed": 1, "running": 0}


async def test_a_context_error_has_the_prompts_length_and_max_tokens(service):
    with pytest.raises(ContextTooLong, match=r"500 tokens and max_tokens 13 .* 512"):
        await outputs_of(service, request([5] * 500, max_tokens=13))


async def test_several_greedy_outputs_are_allowed(service):
    outputs, _ = await outputs_of(service, request(n=2, temperature=0.0, max_tokens=3))
    assert len(outputs) == 2


async def running(service, sent):
    """A generator that has yielded its first chunk."""
    stream = service.generate(sent)
    await anext(stream)
    return stream


@pytest.mark.parametrize("n", [1, 3])
async def test_closing_the_generator_aborts_all_outputs_at_once(service, engine, n):
    stream = await running(service, request(max_tokens=400, n=n))
    await stream.aclose()
    assert engine.aborted == ["r", "r-1", "r-2"][:n]
    assert service.num_running == 0
    assert counts(service)["aborted"] == 1


@pytest.mark.parametrize("n", [1, 3])
async def test_cancelling_the_task_aborts_all_outputs_at_once(service, engine, n):
    engine.pause()
    task = asyncio.create_task(outputs_of(service, request(max_tokens=400, n=n)))
    await until(lambda: len(engine.submitted) == n)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(engine.aborted) == n
    assert counts(service)["aborted"] == 1


@pytest.mark.parametrize("n", [1, 2])
async def test_abort_ends_a_call_by_its_id(service, engine, n):
    stream = await running(service, request(max_tokens=400, n=n))
    assert service.abort("r")
    assert len(engine.aborted) == n
    with pytest.raises(Aborted):
        await anext(stream)
    assert not service.abort("r")
    assert counts(service)["aborted"] == 1


@pytest.mark.parametrize("n", [1, 2])
async def test_a_call_that_waits_for_the_engine_ends_when_it_is_aborted(service, engine, n):
    engine.pause()
    task = asyncio.create_task(outputs_of(service, request(n=n)))
    await until(lambda: len(engine.submitted) == n)
    service.abort("r")
    with pytest.raises(Aborted):
        await task


@pytest.mark.parametrize("n", [1, 2])
async def test_a_deadline_ends_all_outputs(service, engine, n):
    engine.pause()
    with pytest.raises(RequestTimeout, match=r"0\.05 s"):
        await outputs_of(service, request(deadline_s=0.05, n=n))
    assert len(engine.aborted) == n
    assert counts(service)["failed"] == 1


LONG_TEXT = "tide " * 40


@pytest.fixture
def held_tokenizer(monkeypatch):
    """Texts of more than 100 characters wait in their thread until `release` is set. `entered` is set when one is there."""
    held = SimpleNamespace(entered=threading.Event(), release=threading.Event())
    monkeypatch.setattr(text_work, "INLINE_CHARS", 100)

    def encode(self, piece):
        if len(piece) > 100:
            held.entered.set()
            assert held.release.wait(30)
        return encode_now(self, piece)

    encode_now = Tokenizer._encode_piece
    monkeypatch.setattr(Tokenizer, "_encode_piece", encode)
    yield held
    held.release.set()


async def test_the_deadline_includes_the_time_of_tokenising(service, engine, held_tokenizer):
    with pytest.raises(RequestTimeout):
        await outputs_of(service, request(LONG_TEXT, deadline_s=0.02))
    assert not held_tokenizer.release.is_set()  # it did not wait for the tokenizer
    assert not engine.submitted
    assert counts(service)["failed"] == 1


async def test_a_call_that_is_being_tokenised_can_be_aborted(service, engine, held_tokenizer):
    task = asyncio.create_task(outputs_of(service, request(LONG_TEXT)))
    await until(held_tokenizer.entered.is_set)
    assert service.abort("r")
    with pytest.raises(Aborted):
        await task
    assert not engine.submitted
    assert counts(service) == {"started": 1, "finished": 0, "aborted": 1, "failed": 0, "running": 0}


async def test_other_calls_run_while_a_long_text_is_tokenised(service, held_tokenizer):
    long = asyncio.create_task(outputs_of(service, request(LONG_TEXT, id="long", max_tokens=1)))
    await until(held_tokenizer.entered.is_set)
    [(tokens, _, _)], _ = await outputs_of(service, request("Hello", id="short", max_tokens=20))
    assert len(tokens) == 20
    assert not long.done()
    long.cancel()


@pytest.mark.parametrize("prompt", ["a " * 2_000_000, "a" * 3_000_000, "tide gate, " * 1000, [5] * 512, [5] * 600])
async def test_a_prompt_that_cannot_fit_is_refused(service, engine, prompt):
    with pytest.raises(ContextTooLong, match="maximum context length is 512") as caught:
        await outputs_of(service, request(prompt))
    assert caught.value.param == "prompt"
    as_prompt = service.tokenize if isinstance(prompt, str) else service.detokenize
    with pytest.raises(ContextTooLong):
        await as_prompt(prompt, as_prompt=True)
    assert not engine.submitted


async def test_a_chat_that_cannot_fit_is_refused(service):
    with pytest.raises(ContextTooLong) as caught:
        await service.chat_tokens([{"role": "user", "content": "tide " * 100_000}])
    assert caught.value.param == "messages"


async def test_a_prompt_that_just_fits_is_accepted(service, engine):
    await outputs_of(service, request("a" + " a" * 509, max_tokens=1))
    assert len(engine.submitted[0].prompt) == 511
    with pytest.raises(ContextTooLong):
        await outputs_of(service, request("a" + " a" * 510, max_tokens=1))


async def test_a_long_text_can_be_tokenised_and_come_back(service):
    text = "The tide gate lets the water through. " * 3000
    ids = await service.tokenize(text)
    assert ids == TEXT._tokenizer.encode(text).ids
    assert await service.detokenize(ids) == text
    with pytest.raises(InvalidRequest, match="tokens has token id 512"):
        await service.detokenize([*ids, 512])


@pytest.mark.parametrize(
    ("ceiling", "priority", "submitted"), [(-1000, -1000, -1000), (-1000, 7, 7), (0, -5, 0), (0, 5, 5), (3, -1000, 3)]
)
async def test_an_identity_bounds_the_priority(service, engine, ceiling, priority, submitted):
    sent = msgspec.structs.replace(request(n=2), priority=priority)
    await outputs_of(service, sent, Identity(priority_ceiling=ceiling))
    assert [submit.priority for submit in engine.submitted] == [submitted, submitted]


@pytest.mark.parametrize("priority", [-1001, 1001])
async def test_a_priority_out_of_range_is_refused_also_under_a_ceiling(service, priority):
    with pytest.raises(InvalidRequest, match="must lie between -1000 and 1000") as caught:
        await outputs_of(service, msgspec.structs.replace(request(), priority=priority), Identity(priority_ceiling=5))
    assert caught.value.param == "priority"


async def test_identities_with_different_salts_do_not_share_a_prefix(service, engine):
    prompt, cached = list(range(2, 66)), []
    for i, salt in enumerate(["", "a", "a", "b", ""]):
        _, ending = await outputs_of(service, request(prompt, id=f"r{i}", n=2), Identity(salt=salt))
        cached.append(ending.usage.cached_tokens)
    assert cached == [0, 0, 48, 0, 48]
    assert [submit.salt for submit in engine.submitted] == ["", "", "a", "a", "a", "a", "b", "b", "", ""]


async def test_an_id_that_is_running_is_refused_and_its_call_continues(service):
    stream = await running(service, request(max_tokens=30))
    with pytest.raises(InvalidRequest):
        await outputs_of(service, request())
    assert service.num_running == 1
    assert sum([len(item.token_ids) async for item in stream if isinstance(item, Chunk)]) == 29


async def test_a_request_without_an_engine_fails(service, engine):
    engine.unavailable = "it is starting"
    with pytest.raises(EngineUnavailable, match="starting"):
        await outputs_of(service, request())
    assert not service.health().ready
    assert counts(service)["failed"] == 1


@pytest.mark.parametrize("n", [1, 2])
async def test_an_engine_that_is_lost_ends_the_call(service, engine, n):
    stream = await running(service, request(max_tokens=400, n=n))
    engine.fail(EngineUnavailable("the engine died"))
    with pytest.raises(EngineUnavailable):
        async for _ in stream:
            pass
    assert counts(service)["failed"] == 1


async def test_a_full_queue_leaves_no_output_running(service, engine):
    engine.pause()
    streams = [service.generate(request(id=f"q{i}")) for i in range(63)]
    waiting = [asyncio.create_task(anext(stream)) for stream in streams]
    await until(lambda: len(engine.submitted) == 63)
    with pytest.raises(Overloaded):
        await outputs_of(service, request(n=2))
    assert engine.aborted == ["r"]
    engine.resume()
    await asyncio.gather(*waiting)
    for stream in streams:
        await stream.aclose()


class BrokenStream:
    def __init__(self, id):
        self.events = [TokenEvent(id, [5])]

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.events:
            raise StopAsyncIteration
        return self.events.pop()

    def abort(self):
        pass


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_without_a_last_event_is_an_internal_error(service, engine, monkeypatch, n):
    monkeypatch.setattr(engine, "submit", lambda submit: BrokenStream(submit.request_id))
    with pytest.raises(InternalError, match="without a last one"):
        await outputs_of(service, request(n=n))
    assert counts(service)["failed"] == 1


async def test_chat_messages_become_the_prompt_of_the_template(service, monkeypatch):
    monkeypatch.setattr(text_work, "INLINE_CHARS", 100)
    tokens = await service.chat_tokens([{"role": "user", "content": "Hi"}])
    assert tokens[:1] == [0]
    assert TEXT.decode(tokens) == "Hi"
    long = await service.chat_tokens([{"role": "user", "content": "Hi " * 150}])
    assert TEXT.decode(long) == "Hi " * 150
    with pytest.raises(InvalidRequest, match="roles"):
        await service.chat_tokens([{"role": "tool", "content": "Hi"}])
    with pytest.raises(InvalidRequest) as caught:
        await service.chat_tokens([{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}])
    assert caught.value.param == "messages[0]"


async def test_a_model_without_a_chat_template_says_so(engine):
    service = GenerateService(engine, Tokenizer(tiny_tokenizer()), SETTINGS, Metrics("tiny", lambda: engine.health))
    with pytest.raises(InvalidRequest, match="no chat template"):
        await service.chat_tokens([{"role": "user", "content": "Hi"}])


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
