import pytest

from engine.errors import CheckpointError, InvalidRequest
from server.text import chat
from server.text.chat import ChatTemplate
from tests.support.tiny_checkpoint import CHAT_TEMPLATE

USER = [{"role": "user", "content": "Hi"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def test_a_template_gets_messages_special_tokens_and_add_generation_prompt():
    template = ChatTemplate(CHAT_TEMPLATE, TOKENS)
    messages = [*USER, {"role": "assistant", "content": "Hello"}, *USER]
    assert template.render(messages) == "<s><|user|>Hi<|assistant|>Hello</s><|user|>Hi<|assistant|>"
    assert not template.render(USER, add_generation_prompt=False).endswith("<|assistant|>")


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert ChatTemplate("{{ messages[0].content }}", {}).render([{"role": "user", "content": parts}]) == "ab"


def test_a_refusal_by_the_template_is_an_invalid_request_with_its_message():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        template.render(USER)
    assert caught.value.param == "messages"


@pytest.mark.parametrize("source", ["{{ messages[7].content.x }}", "{{ 1 // 0 }}", "{{ none + 1 }}", "{{ 'a' | no_such }}"])
def test_a_template_that_fails_is_named_in_the_error(source):
    with pytest.raises((InvalidRequest, CheckpointError), match="template"):
        ChatTemplate(source, {}).render(USER)


def test_a_template_that_does_not_parse_is_a_checkpoint_error():
    with pytest.raises(CheckpointError, match=r"folder/x.jinja.*line 1"):
        ChatTemplate("{% if %}", {}, origin="folder/x.jinja")


@pytest.mark.parametrize(
    "source",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception.__globals__ }}", "{{ range(10**9) }}"],
)
def test_a_template_cannot_reach_out_of_the_sandbox(source):
    try:
        text = ChatTemplate(source, {}).render(USER)
    except InvalidRequest:
        return
    assert text == ""  # the sandbox makes the expression undefined, which renders as an empty text


def test_messages_are_values_and_never_source():
    template = ChatTemplate("{{ messages[0].content }}", {})
    assert template.render([{"role": "user", "content": "{{ 7 * 7 }}"}]) == "{{ 7 * 7 }}"


def test_a_template_may_use_the_helpers_of_hugging_face():
    source = "{{ {'a': 'é<'} | tojson }}{% for m in messages %}{% break %}{% endfor %}{{ strftime_now('%Y') | length }}"
    assert ChatTemplate(source, {}).render(USER) == '{"a": "é<"}4'


def test_a_prompt_that_grows_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(chat, "MAX_PROMPT_CHARS", 100)
    with pytest.raises(InvalidRequest, match="more than 100 characters"):
        ChatTemplate("{% for i in range(1000) %}x{{ i }}{% endfor %}", {}).render(USER)
