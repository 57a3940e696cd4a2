"""Tests the messages of a conversation: what clients' libraries send back as history, and what is refused by name."""

import pytest
from pydantic import ValidationError

from engine.errors import InvalidRequest, UnsupportedField
from server.errors import from_validation
from server.http.schemas.messages import RESERVED
from server.http.schemas.openai import ChatBody
from server.http.schemas.service import TokenizeBody

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "c"}


def read(messages=(USER,), model=ChatBody, **fields):
    try:
        return model.model_validate({"model": "m", "messages": list(messages), **fields})
    except ValidationError as error:
        raise from_validation(error) from None


def rendered(message):
    """Return what the template gets of `message`, which comes between two messages of the user."""
    return read([USER, message, USER]).conversation.messages[1]


# What each library sends if an answer is appended to the history as the library returned it.
BACK = {
    "openai": {**ANSWER, "refusal": None},
    "openai, dumped": {
        **ANSWER, "refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None, "parsed": None
    },
    "openai, annotated": {**ANSWER, "refusal": None, "annotations": []},
    "openai, cited": {**ANSWER, "annotations": [{"type": "url_citation", "url_citation": {"url": "x", "start_index": 0}}]},
    "litellm": {**ANSWER, "tool_calls": None, "function_call": None, "provider_specific_fields": {"refusal": None}},
    "litellm, reasoning": {
        **ANSWER, "tool_calls": [], "thinking_blocks": None, "images": [], "annotations": [], "provider_specific_fields": None
    },
    "AI SDK": {**ANSWER, "tool_calls": []},
    "LangChain": {**ANSWER, "name": None, "tool_call_id": None},
    "OpenRouter": {**ANSWER, "refusal": None, "reasoning": None, "reasoning_details": []},
    "vLLM": {**ANSWER, "reasoning_content": None, "reasoning": None, "tool_calls": [], "audio": None, "function_call": None},
    "DeepSeek": {**ANSWER, "prefix": False},
}  # fmt: skip


@pytest.mark.parametrize("message", BACK.values(), ids=BACK)
def test_an_answer_can_be_fed_back_as_history(message):
    assert rendered(message) == ANSWER


@pytest.mark.parametrize("message", [{**ANSWER, "content": None}, {"role": "assistant"}])
def test_an_assistants_message_may_have_no_content(message):
    assert rendered(message) == {"role": "assistant"}


def test_parts_with_hints_for_other_servers_are_accepted():
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "annotations": []}
    assert rendered({**USER, "content": [part]}) == {"role": "user", "content": [{"type": "text", "text": "a"}]}


@pytest.mark.parametrize("field", ["name", "reasoning_content", "reasoning"])
def test_names_and_reasoning_reach_the_template(field):
    assert rendered({**ANSWER, field: "x"}) == {**ANSWER, field: "x"}


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
REFUSED = {
    "tool_calls": [CALL],
    "function_call": {"name": "f", "arguments": "{}"},
    "tool_call_id": "1",
    "audio": {"id": "1"},
    "refusal": "no",
    "images": [{}],
    "thinking_blocks": [{}],
    "reasoning_details": [{}],
    "prefix": True,
    "partial": True,
}


@pytest.mark.parametrize(("field", "value"), REFUSED.items(), ids=REFUSED)
def test_what_the_model_cannot_be_told_is_refused_by_name(field, value):
    with pytest.raises(UnsupportedField, match=rf"messages\[1\]\.{field}") as caught:
        rendered({**ANSWER, field: value})
    assert caught.value.param == f"messages[1].{field}"


@pytest.mark.parametrize(
    "kind", ["image_url", "input_audio", "file", "refusal", "thinking", "image", "input_text", "reasoning", ""]
)
def test_a_part_that_is_no_text_is_refused_by_its_place(kind):
    with pytest.raises(UnsupportedField, match="text only") as caught:
        read([{**USER, "content": [{"type": "text", "text": "a"}, {"type": kind, kind: {}}]}])
    assert caught.value.param == "messages[0].content[1].type"


FAULTS = [
    ({"role": "user"}, "messages[0].content", "messages[0].content is required"),
    ({"role": "system", "content": None}, "messages[0].content", "messages[0].content is required"),
    ({"role": "pope", "content": "x"}, "messages[0].role", "messages[0].role must be system, developer, user or assistant"),
    ({"content": "x"}, "messages[0].role", "messages[0].role must be system, developer, user or assistant"),
    ({"role": "user", "content": 7}, "messages[0].content", "messages[0].content must be a string or a list of text parts"),
    ({**USER, "nme": "x"}, "messages[0].nme", "messages[0].nme is not a field of this request"),
]


@pytest.mark.parametrize(("message", "param", "sentence"), FAULTS)
def test_a_faulty_message_is_refused_in_the_clients_terms(message, param, sentence):
    with pytest.raises(InvalidRequest) as caught:
        read([message])
    assert caught.value.param == param
    assert caught.value.message.startswith(sentence)


@pytest.mark.parametrize("model", [ChatBody, TokenizeBody])
def test_a_prompt_cannot_both_begin_an_answer_and_continue_one(model):
    with pytest.raises(InvalidRequest, match="exclude each other") as caught:
        read(model=model, add_generation_prompt=True, continue_final_message=True)
    assert caught.value.param == "continue_final_message"


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_a_name_that_the_server_gives_is_no_name_for_a_client(name):
    with pytest.raises(InvalidRequest, match=name) as caught:
        read(chat_template_kwargs={"x": 1, name: 1})
    assert caught.value.param == f"chat_template_kwargs.{name}"


@pytest.mark.parametrize("value", ["x", [], 1, True, {str(i): i for i in range(65)}])
def test_chat_template_kwargs_must_be_a_small_object(value):
    with pytest.raises(InvalidRequest) as caught:
        read(chat_template_kwargs=value)
    assert caught.value.param == "chat_template_kwargs"


def test_two_different_efforts_are_refused():
    assert read(reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "low"}).reasoning_effort == "low"
    with pytest.raises(InvalidRequest, match="differ") as caught:
        read(reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "high"})
    assert caught.value.param == "reasoning_effort"


@pytest.mark.parametrize("fields", [{"documents": []}, {"chat_template_kwargs": {}}, {"tools": [], "tool_choice": "none"}])
def test_fields_that_ask_for_nothing_are_accepted(fields):
    assert not read(**fields).conversation.documents


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [USER]},
        {"continue_final_message": True},
        {"chat_template": "rag"},
        {"chat_template_kwargs": {"x": 1}},
        {"documents": [{}]},
        {"reasoning_effort": "low"},
    ],
)
def test_fields_of_messages_may_not_be_given_with_a_text_to_tokenise(fields):
    TokenizeBody.model_validate({"prompt": "x", "add_generation_prompt": True, **dict.fromkeys(fields)})
    with pytest.raises(InvalidRequest, match="may not be given with prompt") as caught:
        TokenizeBody.model_validate({"prompt": "x", **fields})
    assert caught.value.param == next(iter(fields))
