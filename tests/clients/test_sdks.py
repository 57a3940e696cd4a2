"""Tests that the clients of CLIENTS get from a server what plain HTTP gets, and raise their own exceptions for its refusals."""

import pytest

from tests.clients.cases import ANSWERED, OTHERS, REFUSED, STOPPED
from tests.clients.clients import CLIENTS


def each(*names):
    """Parametrize a test with each client and each call of `names` that the client makes."""
    pairs = [(client, call) for client in CLIENTS for call in names if call in CLIENTS[client].calls]
    params = [
        pytest.param(client, call, marks=pytest.mark.environment(CLIENTS[client].environment), id=f"{client}-{call}")
        for client, call in pairs
    ]
    return pytest.mark.parametrize(("name", "call"), params)


@pytest.mark.parametrize("call", REFUSED)
def test_the_server_refuses_what_it_cannot_do_by_name(raw, call):
    case, wanted, _ = REFUSED[call]
    status, error = raw.refusal(case)
    assert (status, error["code"], error["param"]) == wanted


def test_the_answers_to_compare_with_differ_where_they_should(raw, cases):
    """Without this, a client that ignored a field would pass."""
    plain, stopped = raw.answer(cases["chat"])["choices"][0], raw.answer(cases["chat_stop"])["choices"][0]
    assert (plain["finish_reason"], stopped["finish_reason"]) == ("length", "stop")
    assert plain["text"].startswith(stopped["text"])
    for several in (raw.answer(cases["chat_n"])["choices"], raw.answer(cases["completion_n"])["choices"]):
        assert len({choice["text"] for choice in several}) == len(several) > 2
    assert len({answer["choices"][0]["text"] for answer in raw.answer(cases["concurrent"])}) == 8
    assert raw.answer(cases["chat_developer"]) == raw.answer(cases["chat"])  # the role is the system's, for this model
    other = [raw.answer(cases[name])["choices"][0]["text"] for name in ("chat_parts", "chat_sampled", "chat_extra_fields")]
    assert len({plain["text"], *other}) == 4
    assert raw.answer(cases["request_id"]) == cases["request_id"].arguments["id"]
    (choice,) = raw.answer(cases["chat_logprobs"])["choices"]
    assert [len(top) for _, _, top in choice["logprobs"]] == [3] * 6


@each(*ANSWERED, *STOPPED, *OTHERS)
def test_a_client_gets_the_answer_of_plain_http(name, call, raw, cases, results):
    client, got = CLIENTS[name], results(name)[call]
    wanted = raw.answer(client.instead.get(call, cases[call]))
    hidden = client.hidden.get(call, ())
    if cases[call].call.endswith("_stream"):
        assert got.pop("pieces", 0) > 1, f"{got} did not come in pieces"
    assert visible(got, hidden) == visible(wanted, hidden)


def visible(answer, hidden):
    """Return an answer without the parts that the client does not show."""
    if not hidden:
        return answer
    choices = [{key: value for key, value in choice.items() if key not in hidden} for choice in answer["choices"]]
    return {key: value for key, value in {**answer, "choices": choices}.items() if key not in hidden}


@each(*REFUSED)
def test_a_refusal_raises_the_exception_of_the_client(name, call, raw, results):
    case, wanted, kind = REFUSED[call]
    error = results(name)[call]["error"]
    assert CLIENTS[name].error(call, kind) in error["classes"], error
    assert error["status_code"] in (None, wanted.status)
    assert error["param"] in (None, wanted.param)
    _, said = raw.refusal(case)
    assert said["message"] in error["message"]


@each("timeout")
def test_a_client_that_does_not_wait_ends_its_request(name, call, results):
    result = results(name)[call]
    assert CLIENTS[name].errors["timeout"] in result["error"]["classes"], result
    assert result["ended"] == 1


@each("cancel")
def test_a_client_that_closes_its_stream_ends_its_request(name, call, results):
    result = results(name)[call]
    assert result["read"] >= 3
    assert result["ended"] == 1


@pytest.mark.environment("llama_index")
def test_instructor_gets_an_object_without_tools(run, cases):
    result = run(CLIENTS["instructor"].command, {"structured": cases["structured"]})["structured"]
    assert result == {"person": {"name": "nobody"}, "text": " {}"}
