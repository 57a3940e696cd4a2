"""Tests the fields of stopping and sampling on every route and over gRPC, whole and streamed.

The fake engine says what a test forces it to say by allowed_token_ids.
"""

import json

import grpc
import pytest

from engine.models.generation import GenerationDefaults
from server.metrics.registry import Metrics
from server.rpc.pb.tidegate.v1 import inference_pb2 as pb
from server.service.service import GenerateService
from server.settings import Settings
from server.text.tokenizer import Tokenizer
from tests.support.http_api import MODEL, http_api
from tests.support.local_engine import LocalEngine
from tests.support.rpc import detail_of, serving
from tests.support.tiny_checkpoint import write_tiny_checkpoint

BEGIN, END, SYSTEM, USER, ASSISTANT = range(5)
ROUTES = {
    "/v1/generate": {"prompt": "The tide"},
    "/v1/completions": {"prompt": "The tide"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "The tide"}]},
}
WAYS = [*[(route, stream) for route in ROUTES for stream in (False, True)], ("grpc", True)]
every_way = pytest.mark.parametrize(("route", "stream"), WAYS, ids=[f"{r}{' streamed' * s}" for r, s in WAYS])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A tokenizer whose end of turn, <|system|>, is not the end token of the engine's config."""
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("demo"))
    path = folder / "tokenizer_config.json"
    template = "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|system|>", "chat_template": template}))
    return Tokenizer.from_folder(folder)


class Output:
    """The first output of an answer: its text, its tokens, and why it ended."""

    def __init__(self, text, tokens, finish, stop, prompt_ids=None, prompt_tokens=None):
        self.text, self.tokens, self.finish, self.stop = text, tokens, finish, stop
        self.prompt_ids, self.prompt_tokens = prompt_ids, prompt_tokens


def joined(chunks):
    """Join the parts of a streamed output."""
    return Output(
        "".join(c.text for c in chunks),
        [t for c in chunks for t in c.tokens],
        next((c.finish for c in chunks if c.finish), None),
        next((c.stop for c in chunks if c.stop is not None), None),
        next((c.prompt_ids for c in chunks if c.prompt_ids), None),
        next((c.prompt_tokens for c in chunks if c.prompt_tokens is not None), None),
    )


def read(answer):
    """Read the first output of a JSON answer, or of one event of a stream."""
    outputs = answer.get("outputs") or answer.get("choices") or [answer]
    [first] = [o for o in outputs if o.get("index", 0) == 0] or [{}]
    message = first.get("message") or first.get("delta") or first
    return Output(
        message.get("content", message.get("text", "")),
        first.get("token_ids", []),
        first.get("finish_reason"),
        first.get("stop_reason"),
        answer.get("prompt_token_ids") or first.get("prompt_token_ids"),
        (answer.get("usage") or {}).get("prompt_tokens"),
    )


class Ways:
    """Sends a request over HTTP or gRPC to one service."""

    def __init__(self, api, rpc):
        self.api, self.rpc = api, rpc

    async def ask(self, route, stream, **fields):
        fields = {"max_tokens": 4, "temperature": 0, "return_token_ids": True, **fields}
        if route == "grpc":
            return await self._ask_grpc(fields)
        body = {**ROUTES[route], **fields}
        if not stream:
            response = await self.api.http.post(route, json=body)
            return read(response.json()) if response.status_code == 200 else response.json()["error"]
        more = {} if route == "/v1/generate" else {"stream_options": {"include_usage": True}}
        response = await self.api.http.post(route, json={**body, "stream": True, **more})
        if response.status_code != 200:
            return response.json()["error"]
        events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
        if "error" in events[-1]:
            return events[-1]["error"]
        return joined([read(event) for event in events])

    async def _ask_grpc(self, fields):
        request = pb.GenerateRequest(**({"prompt": "The tide"} | fields))
        chunks, usage = [], None
        try:
            async for response in self.rpc.stub.Generate(request):
                if response.HasField("chunk"):
                    c = response.chunk
                    stop = c.stop_text if c.WhichOneof("stop_reason") == "stop_text" else None
                    chunks.append(Output(c.text, list(c.token_ids), c.finish_reason, stop, list(c.prompt_token_ids)))
                else:
                    usage = response.ending.usage.prompt_tokens
        except grpc.aio.AioRpcError as error:
            return {"code": detail_of(error).code, "param": detail_of(error).param, "message": error.details()}
        found = joined(chunks)
        found.prompt_tokens = usage
        return found


@pytest.fixture
async def ways(text):
    async with ways_over(text) as ways:
        yield ways


class ways_over:
    """Serve `text` over HTTP and gRPC, with the sampling defaults `defaults`."""

    def __init__(self, text, **defaults):
        self.text, self.defaults = text, GenerationDefaults(**defaults)

    async def __aenter__(self):
        self.engine = LocalEngine()
        self.http = http_api(self.text, engine=self.engine, defaults=self.defaults)
        api = await self.http.__aenter__()
        metrics = Metrics(MODEL, lambda: self.engine.health)
        service = GenerateService(self.engine, self.text, Settings(served_model_name=MODEL), metrics, defaults=self.defaults)
        self.grpc = serving(service)
        return Ways(api, await self.grpc.__aenter__())

    async def __aexit__(self, *error):
        await self.grpc.__aexit__(*error)
        await self.http.__aexit__(*error)


@every_way
async def test_the_tokenizers_own_end_token_ends_an_output(ways, route, stream):
    found = await ways.ask(route, stream, allowed_token_ids=[SYSTEM])
    assert (found.tokens, found.text, found.finish) == ([SYSTEM], "", "stop")


@every_way
async def test_ignore_eos_and_min_tokens_cover_it(ways, route, stream):
    found = await ways.ask(route, stream, allowed_token_ids=[SYSTEM], ignore_eos=True)
    assert (len(found.tokens), found.finish) == (4, "length")
    found = await ways.ask(route, stream, allowed_token_ids=[SYSTEM, USER], min_tokens=2, temperature=0)
    assert found.tokens[:2] == [USER, USER]


@every_way
async def test_a_stop_string_may_be_a_special_token(ways, route, stream):
    found = await ways.ask(route, stream, allowed_token_ids=[USER], stop=["<|user|>"])
    assert (found.tokens, found.text, found.finish, found.stop) == ([USER], "", "stop", "<|user|>")


@every_way
async def test_an_output_may_include_its_stop_string(ways, route, stream):
    found = await ways.ask(route, stream, allowed_token_ids=[USER], stop=["<|user|><|us"], include_stop_str_in_output=True)
    assert (found.tokens, found.text) == ([USER] * 2, "<|user|><|us")


@every_way
@pytest.mark.parametrize(
    ("skip", "shown"), [({}, ""), ({"skip_special_tokens": True}, ""), ({"skip_special_tokens": False}, "<|user|>")]
)
async def test_special_tokens_are_shown_if_the_request_asks(ways, route, stream, skip, shown):
    found = await ways.ask(route, stream, allowed_token_ids=[USER], spaces_between_special_tokens=False, **skip)
    assert found.text == shown * 4


@every_way
async def test_only_allowed_tokens_are_generated(ways, route, stream):
    found = await ways.ask(route, stream, allowed_token_ids=[480, 300, 150], max_tokens=40, temperature=1)
    assert set(found.tokens) == {150, 300, 480}


@every_way
async def test_bad_words_are_not_generated(ways, text, route, stream):
    word, spaced = (text.encode(t, add_special_tokens=False) for t in ("tide", " tide"))
    other = text.encode("x", add_special_tokens=False)
    tokens = sorted({*word, *spaced, *other})
    fields = {"allowed_token_ids": tokens, "max_tokens": 60, "temperature": 1, "seed": 3}
    if route == "/v1/completions":
        assert "tide" in (await ways.ask(route, stream, **fields)).text
    assert "tide" not in (await ways.ask(route, stream, **fields, bad_words=["tide"])).text


@every_way
async def test_restrictions_that_leave_no_token_are_the_requests_own_fault(ways, text, route, stream):
    found = await ways.ask(route, stream, allowed_token_ids=text.encode("x", add_special_tokens=False), bad_words=["x"])
    assert (found["code"], found["param"]) == ("invalid_value", "allowed_token_ids")
    assert "allowed_token_ids and bad_words together exclude every token" in found["message"]


@every_way
async def test_the_last_tokens_of_a_prompt_can_be_used(ways, route, stream):
    whole = await ways.ask(route, stream)
    found = await ways.ask(route, stream, truncate_prompt_tokens=2)
    assert (found.prompt_ids, found.prompt_tokens) == (whole.prompt_ids[-2:], 2)


async def test_a_prompt_is_cut_to_what_the_context_leaves(ways):
    long = {"prompt": "tide " * 1000}
    for route, stream in WAYS[:4]:
        assert (await ways.ask(route, stream, **long))["code"] == "context_length_exceeded"
        assert (await ways.ask(route, stream, **long, truncate_prompt_tokens=-1)).prompt_tokens == 512 - 4
    chat = {"messages": [{"role": "user", "content": long["prompt"]}], "truncate_prompt_tokens": -1}
    assert (await ways.ask("/v1/chat/completions", False, **chat)).prompt_tokens == 512 - 4


@every_way
async def test_numbers_that_switch_something_off_or_are_negative(ways, route, stream):
    found = await ways.ask(route, stream, top_k=-1, seed=-5, temperature=1, ignore_eos=True)
    assert found.tokens == (await ways.ask(route, stream, top_k=0, seed=-5, temperature=1, ignore_eos=True)).tokens
    assert found.tokens != (await ways.ask(route, stream, top_k=0, seed=5, temperature=1, ignore_eos=True)).tokens


@every_way
async def test_nothing_may_be_generated(ways, route, stream):
    found = await ways.ask(route, stream, max_tokens=0)
    assert (found.text, found.tokens, found.finish) == ("", [], "length")
    assert found.prompt_tokens > 2


@every_way
async def test_the_prompts_ids_are_returned(ways, text, route, stream):
    found = await ways.ask(route, stream)
    prompt = "<|user|>The tide" if "chat" in route else "The tide"
    assert found.prompt_ids == text.encode(prompt)
    assert len(found.tokens) == 4
    without = await ways.ask(route, stream, return_token_ids=False)
    assert without.prompt_ids is None


@every_way
async def test_the_authors_defaults_hold_where_the_request_says_nothing(text, route, stream):
    async with ways_over(text, params={"max_tokens": 3, "temperature": 0.0}, bad_words=((100,),)) as ways:
        found = await ways.ask(route, stream, max_tokens=None, temperature=None, ignore_eos=True) if route != "grpc" else None
        if route == "grpc":
            request = pb.GenerateRequest(prompt="The tide", ignore_eos=True)
            found = joined([Output("", list(r.chunk.token_ids), None, None) async for r in ways.rpc.stub.Generate(request)])
        assert len(found.tokens) == 3
        assert found.tokens == (await ways.ask(route, stream, max_tokens=3, temperature=0, ignore_eos=True)).tokens
        allowed = await ways.ask(route, stream, allowed_token_ids=[100, 101])
        assert allowed.tokens == [101] * 4


async def test_the_defaults_are_told(text):
    async with ways_over(text, params={"temperature": 0.25, "top_k": 20}) as ways:
        [model] = (await ways.api.http.get("/v1/models")).json()["data"]
        assert model["default_sampling_params"] == {"temperature": 0.25, "top_k": 20}
        [model] = (await ways.rpc.stub.ListModels(pb.ListModelsRequest())).models
        assert (model.default_sampling_params.temperature, model.default_sampling_params.top_k) == (0.25, 20)
        assert not model.default_sampling_params.HasField("top_p")


async def test_a_default_of_max_tokens_yields_to_the_context(text):
    async with ways_over(text, params={"max_tokens": 2048}) as ways:
        for route in ROUTES:
            found = await ways.ask(route, False, max_tokens=None, ignore_eos=True)
            assert found.finish == "length"
            assert len(found.tokens) + found.prompt_tokens == 512


@pytest.mark.parametrize(("limit", "left"), [(7, 512 - 7), (512, 511), (2048, 511)])
async def test_a_prompt_is_cut_to_what_the_default_of_max_tokens_leaves(text, limit, left):
    async with ways_over(text, params={"max_tokens": limit}) as ways:
        for route, body in ROUTES.items():
            [(name, value)] = body.items()
            long = {name: "tide " * 1000 if name == "prompt" else [{**value[0], "content": "tide " * 1000}]}
            found = await ways.ask(route, False, **long, truncate_prompt_tokens=-1, max_tokens=None, ignore_eos=True)
            assert (route, found.prompt_tokens, len(found.tokens)) == (route, left, 512 - left)


async def test_detokenize_keeps_special_tokens(ways):
    for skip, shown in ((None, "<|begin|><|user|>"), (False, "<|begin|><|user|>"), (True, "")):
        answer = await ways.api.http.post("/detokenize", json={"tokens": [BEGIN, USER], "skip_special_tokens": skip})
        assert answer.json() == {"prompt": shown}
        made = await ways.rpc.stub.Detokenize(pb.DetokenizeRequest(tokens=[BEGIN, USER], skip_special_tokens=skip))
        assert made.prompt == shown
