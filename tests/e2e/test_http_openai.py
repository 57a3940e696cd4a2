"""Tests the HTTP side of a server with the unmodified openai client."""

import json

import msgspec
import openai
import pytest

from server.text.tokenizer import Tokenizer
from tests.support.http_api import MODEL, http_api
from tests.support.local_engine import CONFIG, LocalEngine
from tests.support.tiny_checkpoint import write_tiny_checkpoint

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return Tokenizer.from_folder(write_tiny_checkpoint(tmp_path_factory.mktemp("demo")))


@pytest.fixture
async def api(text):
    async with http_api(text) as api:
        yield api
        await api.quiet()


async def test_models_are_listed_and_retrieved(api):
    models = await api.openai.models.list()
    assert [m.id for m in models.data] == [MODEL]
    assert (await api.openai.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        await api.openai.models.retrieve("other/model")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": ""}])
@pytest.mark.parametrize("stream", [False, True])
async def test_the_model_may_be_left_out_and_the_answer_names_the_one_that_is_served(api, model, stream):
    for path, body in (("/v1/completions", {"prompt": "x", "echo": True}), ("/v1/chat/completions", {"messages": HELLO})):
        answer = await api.http.post(path, json={**body, **model, "max_tokens": 2, "stream": stream})
        assert answer.status_code == 200, answer.text
        events = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]] if stream else [answer.json()]
        assert {event["model"] for event in events} == {MODEL}


async def test_the_usage_so_far_ends_with_the_usage_of_the_whole_answer(api):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 9, "stream": True, "extra_body": {"ignore_eos": True}}
    usages = [chunk.usage async for chunk in await api.openai.chat.completions.create(**body, stream_options=options)]
    assert usages[0].prompt_tokens > 0
    assert usages[0].completion_tokens == 0
    assert usages[-2] == usages[-1]
    assert usages[-1].completion_tokens == 9


async def test_an_answer_can_be_sent_back_as_it_came(api):
    answer = await api.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4)
    for said in (answer.choices[0].message, answer.choices[0].message.model_dump()):
        again = await api.openai.chat.completions.create(model=MODEL, messages=[*HELLO, said, *HELLO], max_tokens=4)
        assert again.choices[0].message.role == "assistant"


async def test_a_completion(api):
    answer = await api.openai.completions.create(model=MODEL, prompt="Once", max_tokens=8, temperature=0)
    assert answer.object == "text_completion"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens <= 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@pytest.mark.parametrize("n", [1, 3])
async def test_a_streamed_completion_has_the_text_of_the_whole_one(api, n):
    body = {
        "model": MODEL,
        "prompt": ["Once", "The tide"],
        "max_tokens": 12,
        "n": n,
        "seed": 7,
        "extra_body": {"ignore_eos": True},
    }
    whole = await api.openai.completions.create(**body)
    texts = {}
    async for chunk in await api.openai.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert len(texts) == 2 * n
    assert usage.completion_tokens == whole.usage.completion_tokens == 12 * 2 * n


async def test_a_chat_completion(api):
    answer = await api.openai.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=9, seed=1)
    assert answer.choices[0].message.role == "assistant"
    assert 1 <= answer.usage.completion_tokens <= 9


async def test_a_streamed_chat_completion_has_the_text_of_the_whole_one(api):
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 20, "seed": 3, "extra_body": {"ignore_eos": True}}
    whole = await api.openai.chat.completions.create(**body)
    streamed, usage = "", None
    async for chunk in await api.openai.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage
        streamed += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert streamed == whole.choices[0].message.content
    assert usage == whole.usage.model_copy(update={"prompt_tokens_details": usage.prompt_tokens_details})


async def test_the_clients_stream_helper_reads_a_stream(api):
    """The openai client's stream helper raises if an answer ends by its length, so the request sets many stop tokens."""
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 60, "seed": 1, "extra_body": {"stop_token_ids": list(range(256))}}
    async with api.openai.chat.completions.stream(**body) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].finish_reason == "stop"


async def test_a_chat_without_a_limit_ends_at_the_end_of_the_context(api):
    answer = await api.openai.chat.completions.create(model=MODEL, messages=HELLO, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.total_tokens == api.service.max_model_len


async def test_chat_completions_report_log_probabilities(api):
    answer = await api.openai.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=2, extra_body={"ignore_eos": True}
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 3
    assert all(len(at.top_logprobs) == 2 and at.logprob <= 0 for at in content)


async def test_echoed_prompts_have_log_probabilities(api):
    answer = await api.openai.completions.create(model=MODEL, prompt="Once upon", max_tokens=2, logprobs=1, echo=True)
    choice = answer.choices[0]
    assert choice.text.startswith("Once upon")
    assert len(choice.logprobs.tokens) == answer.usage.total_tokens
    assert choice.logprobs.token_logprobs[0] is None


async def test_a_stop_string_ends_the_text_before_it(api):
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 40, "seed": 5, "extra_body": {"ignore_eos": True}}
    text = (await api.openai.completions.create(**body)).choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    answer = await api.openai.completions.create(**body, stop=stop)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == text.partition(stop)[0]


@pytest.mark.parametrize(
    ("more", "error", "param"),
    [
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"nope": 1}}, openai.BadRequestError, "nope"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format"),
        ({"model": "gpt-9"}, openai.NotFoundError, "model"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x " * 5000}]}, openai.BadRequestError, "messages"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_raise_the_exceptions_of_the_client(api, more, error, param, stream):
    with pytest.raises(error) as caught:
        await api.openai.chat.completions.create(**{"model": MODEL, "messages": HELLO, **more}, stream=stream)
    assert caught.value.param == param
    assert caught.value.code


async def test_an_unavailable_engine_is_503(api):
    api.engine.unavailable = "the engine is restarting"
    with pytest.raises(openai.InternalServerError) as caught:
        await api.openai.completions.create(model=MODEL, prompt="x")
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "1"
    ready = await api.http.get("/health/ready")
    assert (ready.status_code, ready.json()["reason"]) == (503, "the engine is restarting")
    assert (await api.http.get("/health/live")).status_code == 200


async def test_openais_client_names_a_latency_class(api):
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    for more in ({}, {"extra_body": {"slo_class": "interactive"}}, {"service_tier": "flex"}):
        answer = await api.openai.chat.completions.create(**chat, **more)
        assert answer.service_tier == more.get("service_tier")
    asked = [(submit.slo, submit.promised) for submit in api.engine.submitted[-3:]]
    assert asked == [("standard", False), ("interactive", True), ("batch", True)]


async def test_a_full_queue_is_429(text):
    scheduler = msgspec.structs.replace(CONFIG.scheduler, max_queue=1, max_num_seqs=1)
    engine = LocalEngine(msgspec.structs.replace(CONFIG, scheduler=scheduler))
    async with http_api(text, engine=engine) as api:
        engine.pause()
        with pytest.raises(openai.RateLimitError) as caught:
            await api.openai.completions.create(model=MODEL, prompt=["a", "b", "c"])
        engine.resume()
        assert int(caught.value.response.headers["retry-after"]) >= 1
        await api.quiet()


async def test_a_stream_that_is_closed_early_ends_its_request(api):
    stream = await api.openai.completions.create(
        model=MODEL, prompt="x", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    async for _ in stream:
        break
    await stream.close()
    await api.quiet(1.0)
    assert len(api.engine.aborted) <= 1


async def test_a_request_whose_client_gives_up_is_aborted(api):
    api.engine.pause()
    with pytest.raises(openai.APITimeoutError):
        await api.openai.completions.create(model=MODEL, prompt="x", max_tokens=400, timeout=0.2)
    api.engine.resume()
    await api.quiet(1.0)
    assert len(api.engine.aborted) == 1


async def test_generate_accepts_the_content_type_that_curl_sends(api):
    response = await api.http.post(
        "/v1/generate",
        content=json.dumps({"prompt": "def fib(n):", "max_tokens": 4}),
        headers={"content-type": "application/x-www-form-urlencoded"},
    )
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] >= 1


async def test_text_is_tokenised_and_detokenised_to_itself(api):
    tokens = (await api.http.post("/tokenize", json={"prompt": "the tide", "add_special_tokens": False})).json()["tokens"]
    assert (await api.http.post("/detokenize", json={"tokens": tokens})).json() == {"prompt": "the tide"}


async def test_metrics_count_requests(api):
    await api.openai.completions.create(model=MODEL, prompt="x", max_tokens=4)
    metrics = (await api.http.get("/metrics")).text
    assert 'tidegate_requests_started_total{transport="http"} 1.0' in metrics
    assert "vllm:num_requests_running" in metrics
