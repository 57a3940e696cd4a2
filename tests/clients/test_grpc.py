"""Tests gRPC with clients that are not Tidegate's: `buf curl`, which has no proto file and uses reflection, and @grpc/grpc-js."""

import json
import subprocess

import pytest

from tests.clients import install
from tests.clients.cases import Case
from tests.support import plain_http
from tests.support.children import ROOT

pytestmark = pytest.mark.environment("node")

PROMPT = "import os\n\ndef "
GREEDY = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
LONG = {**GREEDY, "max_tokens": 3000, "ignore_eos": True}
GENERATED = {
    "generate": GREEDY,
    "sampled": {**GREEDY, "temperature": 0.9, "top_p": 0.9, "top_k": 50, "seed": 11, "presence_penalty": 0.5},
    "several": {**GREEDY, "temperature": 0.9, "seed": 3, "n": 3},
    "logprobs": {**GREEDY, "logprobs": 2},
    "stopped": {**GREEDY, "stop": ["():", "nowhere to be found"]},
    "tokens": {"prompt_token_ids": [0, 756, 1055], "max_tokens": 5, "temperature": 0, "logit_bias": {"203": -100}},
}
REFUSED = {
    "unknown_model": (Case("unknown_model", GREEDY), "NOT_FOUND", "model_not_found", "model"),
    "wrong_value": (Case("generate", {**GREEDY, "temperature": -1}), "INVALID_ARGUMENT", "invalid_value", "temperature"),
    "no_prompt": (Case("generate", {}), "INVALID_ARGUMENT", "invalid_value", "prompt"),
    "context_too_long": (
        Case("generate", {"prompt": "so it goes " * 3000}),
        "INVALID_ARGUMENT",
        "context_length_exceeded",
        "prompt",
    ),
}
OTHERS = {
    "concurrent": Case("concurrent", {**GREEDY, "temperature": 0.9, "seeds": list(range(8))}),
    "tokenize": Case("tokenize", {"prompt": PROMPT}),
    "detokenize": Case("detokenize", {"tokens": [756, 1055, 203]}),
    "models": Case("models", {}),
    "health": Case("health", {"service": "tidegate.v1.Inference"}),
    "unknown_service": Case("health", {"service": "nothing.of.the.kind"}),
    "deadline": Case("deadline", LONG),
    "cancel": Case("cancel", LONG),
    "abort": Case("abort", LONG),
    "abort_unknown": Case("abort_unknown", {"id": "gen-0"}),
}


@pytest.fixture(scope="module")
def http(server):
    with plain_http.Client(base_url=server.url, timeout=60, trust_env=False) as http:
        yield http


def generated(http, body):
    """Return what /v1/generate answers, without what differs from run to run."""
    answer = http.post("/v1/generate", json=body).json()
    kept = ("index", "text", "token_ids", "finish_reason")
    outputs = [{name: output[name] for name in kept} | {"logprobs": output.get("logprobs") or []} for output in answer["outputs"]]
    usage = {name: answer["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
    return {"outputs": outputs, "model": answer["model"], "usage": usage}


@pytest.fixture(scope="module")
def node(server, run):
    calls = {name: Case("generate", body) for name, body in GENERATED.items()}
    calls |= {name: case for name, (case, *_) in REFUSED.items()} | OTHERS
    address, protos = f"127.0.0.1:{server.grpc_port}", str(ROOT / "protos")
    return run(install.node_command("grpc_node.mjs"), calls, grpc=address, protos=protos)


@pytest.mark.parametrize("name", GENERATED)
def test_node_gets_the_tokens_of_http(node, http, name):
    assert node[name] == {**generated(http, GENERATED[name]), "one_id": True}


def test_node_calls_at_once_get_what_each_gets_alone(node, http):
    body = {name: value for name, value in OTHERS["concurrent"].arguments.items() if name != "seeds"}
    wanted = [{**generated(http, {**body, "seed": seed}), "one_id": True} for seed in range(8)]
    assert node["concurrent"] == wanted
    assert len({answer["outputs"][0]["text"] for answer in wanted}) == 8


@pytest.mark.parametrize("name", REFUSED)
def test_node_gets_status_and_detail_of_an_error(node, name):
    _, status, code, param = REFUSED[name]
    error = node[name]["error"]
    assert (error["status"], error["code"], error["param"]) == (status, code, param)
    assert error["message"]


def test_node_converts_text_to_tokens_and_back(node, http):
    assert node["tokenize"] == http.post("/tokenize", json={"prompt": PROMPT}).json()
    assert node["detokenize"] == http.post("/detokenize", json={"tokens": [756, 1055, 203]}).json()


def test_node_lists_the_models(node, http):
    (card,) = http.get("/v1/models").json()["data"]
    kept = ("id", "created", "owned_by", "max_model_len")
    (model,) = node["models"]["models"]
    assert {name: model[name] for name in kept} == {name: card[name] for name in kept}
    assert (model["default_sampling_params"] or {}) == card["default_sampling_params"]


def test_node_checks_the_health(node):
    assert node["health"] == {"status": "SERVING"}
    assert node["unknown_service"]["error"]["status"] == "NOT_FOUND"


def test_node_calls_end_at_their_deadline(node):
    """Server and client both end the call, and the client shows what came first."""
    error = node["deadline"]["error"]
    assert error["status"] == "DEADLINE_EXCEEDED"
    assert error.get("code") in (None, "request_timeout")
    assert node["deadline"]["ended"] == 1


def test_node_ends_a_request_by_cancelling_or_by_abort(node):
    assert node["cancel"]["error"]["status"] == "CANCELLED"
    assert node["cancel"]["ended"] == 1
    assert node["abort"]["error"]["status"] == "CANCELLED"
    assert node["abort"]["error"]["code"] == "aborted"
    assert node["abort"]["aborted"] is True
    assert node["abort_unknown"] == {"aborted": False}


@pytest.fixture(scope="module")
def buf(server):
    """Return a function that calls a method with `buf curl`. It returns (exit code, the messages, standard error)."""

    def buf(path, message=None, *more):
        command = [*install.npm_command("buf"), "curl", "--protocol", "grpc", "--http2-prior-knowledge", *more]
        data = [] if message is None else ["--data", json.dumps(message)]
        url = f"http://127.0.0.1:{server.grpc_port}{path}"
        done = subprocess.run([*command, *data, url], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, documents(done.stdout), done.stderr

    return buf


def documents(text):
    """Return the JSON documents in a text, or its lines if it has none."""
    found, decoder, at = [], json.JSONDecoder(), 0
    if not text.startswith("{"):
        return text.split()
    while at < len(text.rstrip()):
        document, at = decoder.raw_decode(text, at)
        found.append(document)
        at += len(text) - at - len(text[at:].lstrip())
    return found


def test_buf_lists_the_services_by_reflection(buf):
    code, methods, _ = buf("", None, "--list-methods")
    assert code == 0
    own = {f"tidegate.v1.Inference/{name}" for name in ("Generate", "Tokenize", "Detokenize", "ListModels", "Abort")}
    assert own | {"grpc.health.v1.Health/Check", "grpc.health.v1.Health/Watch"} <= set(methods)


@pytest.mark.parametrize("more", [(), ("--schema", "protos")], ids=["reflection", "schema"])
def test_buf_streams_the_tokens_of_http(buf, http, more):
    code, responses, errors = buf("/tidegate.v1.Inference/Generate", {"prompt": PROMPT, "maxTokens": 12, "temperature": 0}, *more)
    assert code == 0, errors
    chunks = [response["chunk"] for response in responses if "chunk" in response]
    (wanted,) = generated(http, GREEDY)["outputs"]
    assert len(chunks) > 1
    assert "".join(chunk.get("text", "") for chunk in chunks) == wanted["text"]
    assert [token for chunk in chunks for token in chunk.get("tokenIds", [])] == wanted["token_ids"]
    assert chunks[-1]["finishReason"] == "length"
    assert responses[-1]["ending"]["usage"] == {"promptTokens": "6", "completionTokens": "12", "cachedTokensByTier": {}}
    assert len({response["id"] for response in responses}) == 1


def test_buf_calls_the_other_methods(buf, http):
    wanted = http.post("/tokenize", json={"prompt": PROMPT}).json()
    code, (answer,), _ = buf("/tidegate.v1.Inference/Tokenize", {"prompt": PROMPT})
    assert (code, answer["tokens"], answer["count"]) == (0, wanted["tokens"], str(wanted["count"]))
    code, (answer,), _ = buf("/tidegate.v1.Inference/Detokenize", {"tokens": wanted["tokens"][1:]})
    assert (code, answer) == (0, {"prompt": PROMPT})
    code, (answer,), _ = buf("/tidegate.v1.Inference/ListModels", {})
    assert (code, [model["id"] for model in answer["models"]]) == (0, [http.get("/v1/models").json()["data"][0]["id"]])
    assert buf("/grpc.health.v1.Health/Check", {})[:2] == (0, [{"status": "SERVING"}])
    assert buf("/tidegate.v1.Inference/Abort", {"id": "gen-0"})[:2] == (0, [{}])


def test_buf_shows_the_error_of_a_call(buf):
    code, _, errors = buf("/tidegate.v1.Inference/Generate", {"prompt": PROMPT, "model": "nobody/nothing"})
    assert code != 0
    (error,) = documents(errors)
    assert error["code"] == "not_found"
    assert "nobody/nothing" in error["message"]
