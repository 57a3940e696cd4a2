"""Tests what a chat template gets and may do, and how its failures are reported."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.errors import CheckpointError, InvalidRequest, UnsupportedField
from server.text import chat, template_environment
from server.text.chat import ChatTemplate
from server.text.conversation import Conversation
from tests.support.tiny_checkpoint import CHAT_TEMPLATE

USER = [{"role": "user", "content": "Hi"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
ONE, TWO = {"type": "text", "text": "one"}, {"type": "text", "text": "two"}
PARTS = [{"role": "user", "content": [ONE, TWO]}]


def render(source, messages=USER, tokens=TOKENS, **options):
    return ChatTemplate(source, tokens).render(Conversation(messages=messages, **options))


def test_a_template_gets_messages_special_tokens_and_add_generation_prompt():
    messages = [*USER, {"role": "assistant", "content": "Hello"}, *USER]
    assert render(CHAT_TEMPLATE, messages) == "<s><|user|>Hi<|assistant|>Hello</s><|user|>Hi<|assistant|>"
    assert not render(CHAT_TEMPLATE, add_generation_prompt=False).endswith("<|assistant|>")


def test_tools_and_documents_are_none_when_absent():
    assert (
        render("{{ tools is none }} {{ documents is none }} {{ tools is defined and documents is defined }}") == "True True True"
    )


def test_the_generation_tag_renders_its_body_and_keeps_its_variables():
    source = "{% for m in messages %}{% generation %}{% set x = 1 %}{{ m.content }}{{ x }}{% endgeneration %}{{ x }}{% endfor %}"
    assert render(source, [*USER, *USER]) == "Hi1Hi1"


# --- content


LOOP = "{% for m in messages %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}|{% endif %}{% endfor %}{% endfor %}"
TAKES_PARTS = {
    "a loop": LOOP,
    "a variable": "{% for m in messages %}{% set c = m['content'] %}{% for p in c %}{{ p['text'] }}|{% endfor %}{% endfor %}",
    "get": "{% for m in messages %}{% for p in m.get('content') %}{{ p.get('text') }}|{% endfor %}{% endfor %}",
    "a macro": "{% macro show(c) %}{% for p in c %}{{ p.text }}|{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
    "filters": "{% for m in messages %}{{ m.content | selectattr('type', 'equalto', 'text')"
    " | map(attribute='text') | join('|') }}|{% endfor %}",
    "a namespace": "{% set ns = namespace() %}{% for m in messages %}{% set ns.c = m.content %}"
    "{% for p in ns.c %}{{ p.text }}|{% endfor %}{% endfor %}",
    "another name of the messages": "{% set ms = messages if messages[0].role != 'system' else messages[1:] %}"
    "{% for m in ms %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endfor %}",
}
TAKES_BOTH = {
    "is string": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}|{% endfor %}{% endif %}{% endfor %}",
    "is iterable": "{% for m in messages %}{% if m.content is iterable and m.content is not string %}"
    "{% for p in m.content %}{{ p.text }}|{% endfor %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "is mapping": "{% for m in messages %}{% for p in m.content %}{% if p is mapping %}{{ p.text }}|{% else %}{{ p }}{% endif %}"
    "{% endfor %}{% endfor %}",
}
TAKES_TEXT = {
    "as it is": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "trimmed": "{% for m in messages %}{{ m.content | trim }}{% endfor %}",
    "concatenated": "{% for m in messages %}{{ '' + m['content'] }}{% endfor %}",
    "letter by letter": "{% for m in messages %}{% for letter in m.content %}{{ letter }}{% endfor %}{% endfor %}",
    "line by line": "{% for m in messages %}{% for line in m.content.split('\n') %}{{ line }}"
    "{{ '\n' if not loop.last }}{% endfor %}{% endfor %}",
    "as JSON": "{% for m in messages %}{{ (m.content | tojson)[1:-1].replace('\\\\n', '\n') }}{% endfor %}",
    "a loop over something else": "{% for m in messages %}{% for c in m.calls %}{{ c.text }}{% endfor %}"
    "{{ m.content }}{% endfor %}",
}


@pytest.mark.parametrize("source", [*TAKES_PARTS.values(), *TAKES_BOTH.values()], ids=[*TAKES_PARTS, *TAKES_BOTH])
def test_a_template_that_takes_parts_gets_the_parts(source):
    assert render(source, PARTS) == "one|two|"


@pytest.mark.parametrize("source", TAKES_PARTS.values(), ids=TAKES_PARTS)
def test_a_template_that_takes_only_parts_gets_a_string_as_one_part(source):
    assert render(source) == "Hi|"


@pytest.mark.parametrize("source", [*TAKES_TEXT.values(), *TAKES_BOTH.values()], ids=[*TAKES_TEXT, *TAKES_BOTH])
def test_a_template_that_takes_strings_gets_the_string(source):
    assert render(source) == "Hi"


@pytest.mark.parametrize("source", TAKES_TEXT.values(), ids=TAKES_TEXT)
def test_a_template_that_takes_only_strings_gets_the_parts_joined_by_a_newline(source):
    assert render(source, PARTS) == "one\ntwo"


def test_each_role_has_its_own_form_of_content():
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ '[' + m.content + ']' }}{% elif m.role == 'assistant' %}"
        "{{ m.content[0].text }}{% else %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endif %}{% endfor %}"
    )
    roles = ("system", "user", "assistant", "user")
    assert render(source, [{"role": role, "content": "x"} for role in roles]) == "[x]x|xx|"
    # A template that shows only the first part of a list gets all texts in one part.
    assert render(source, [{"role": role, "content": [ONE, TWO]} for role in roles]) == "[one\ntwo]one|two|one\ntwoone|two|"


def test_a_template_that_needs_a_name_of_the_client_still_gets_its_form_of_content():
    source = "{% if not mode %}{{ raise_exception('mode is required') }}{% endif %}" + LOOP
    assert render(source, PARTS, variables={"mode": "x"}) == "one|two|"
    assert render(source, USER, variables={"mode": "x"}) == "Hi|"


def test_a_message_without_content_is_shown_as_an_empty_one():
    messages = [*USER, {"role": "assistant", "content": None}, *USER]
    assert render("{% for m in messages %}[{{ m.content }}]{% endfor %}", messages) == "[Hi][][Hi]"
    assert render("{% for m in messages %}{{ '[' + m.content + ']' }}{% endfor %}", messages) == "[Hi][][Hi]"
    assert render("{% for m in messages %}{{ '[' + m.content[0].text + ']' }}{% endfor %}", messages) == "[Hi][][Hi]"
    assert render("{% for m in messages %}{{ 'content' in m }} {% endfor %}", messages) == "True False True "


def test_a_developer_is_a_system_unless_the_template_knows_developers():
    messages = [{"role": "developer", "content": "x"}, *USER]
    assert render(CHAT_TEMPLATE, messages) == "<s><|system|>x<|user|>Hi<|assistant|>"
    for knows in ("{% if m.role == 'developer' %}D{% endif %}", "{{ 'D' if m.role in ['system', 'developer'] }}"):
        assert render("{% for m in messages %}" + knows + "{{ m.role }} {% endfor %}", messages) == "Ddeveloper user "
    # A template that only speaks of developers does not know the role.
    assert render("You help developers.{% for m in messages %} {{ m.role }}{% endfor %}{{ 'by developers' }}", messages) == (
        "You help developers. system userby developers"
    )


def test_names_and_reasoning_reach_the_template():
    messages = [{"role": "user", "content": "x", "name": "ann"}, {"role": "assistant", "content": "y", "reasoning": "z"}]
    source = "{% for m in messages %}{{ m.name }}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}"
    assert render(source, messages) == "annzz"


# --- what a client may ask for


def test_the_names_of_a_client_reach_the_template():
    source = "{{ enable_thinking }} {{ bos_token }} {{ tools }}"
    assert render(source, variables={"enable_thinking": False}) == "False <s> None"
    assert render(source, variables={"bos_token": "B", "tools": [1], "messages": []}) == " B None"


@pytest.mark.parametrize(
    ("used", "asked"),
    [("documents", {"documents": [{"text": "x"}]}), ("reasoning_effort", {"reasoning_effort": "high"})],
)
def test_what_a_template_does_not_use_is_refused_by_name(used, asked):
    with pytest.raises(UnsupportedField, match=used) as caught:
        render("{{ messages[0].content }}", **asked)
    assert caught.value.param == used
    assert str(asked[used]) in render("{{ " + used + " }}", **asked)
    assert render("{% if not " + used + " is defined %}{% set " + used + " = 'low' %}{% endif %}{{ " + used + " }}", **asked)


def test_what_asks_for_nothing_is_accepted_by_every_template():
    assert render("{{ messages[0].content }}", documents=[], reasoning_effort="medium") == "Hi"
    assert render("{{ documents }} {{ reasoning_effort }}", documents=[], reasoning_effort="medium") == "[] medium"


BEGUN = [*USER, {"role": "assistant", "content": "The tide "}]


@pytest.mark.parametrize(
    ("shown", "prompt"),
    [
        ("{{ m.content }}", "<user>Hi</s><assistant>The tide "),
        ("{{ m.content | trim }}", "<user>Hi</s><assistant>The tide"),
        ("{% for p in m.content %}{{ p.text }}{% endfor %}", "<user>Hi</s><assistant>The tide "),
    ],
)
def test_the_last_message_can_be_continued(shown, prompt):
    source = "{% for m in messages %}<{{ m.role }}>" + shown + "{{ eos_token }}{% endfor %}"
    asked = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(source, BEGUN, **asked) == prompt
    assert render(source, [*USER, {"role": "assistant", "content": [{"type": "text", "text": "The tide "}]}], **asked) == prompt


@pytest.mark.parametrize(
    ("source", "last"),
    [("{% for m in messages %}{{ m.role }}{% endfor %}", "x"), ("{{ messages[0].content }}", "x"), (CHAT_TEMPLATE, None)],
)
def test_a_message_that_cannot_be_continued_is_refused(source, last):
    with pytest.raises(InvalidRequest) as caught:
        render(source, [*USER, {"role": "assistant", "content": last}], continue_final_message=True, add_generation_prompt=False)
    assert caught.value.param == "continue_final_message"


# --- failures and bounds


def test_a_refusal_by_the_template_is_an_invalid_request_with_its_message():
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "\n{{ messages[7].content.x }}",
        "\n{{ 1 // 0 }}",
        "\n{{ none + 1 }}",
        "\n{{ messages | tojson(default=1) }}",
        "\n{{ '{x}'.format(y=1) }}",
        "\n{% include 'x' %}",
        "\n{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "\n{{ 'x' * 10**12 }}",
        "\n{{ namespace(_x=1) }}",
    ],
)
def test_a_template_that_fails_is_reported_with_the_line_and_in_our_words(source):
    with pytest.raises(InvalidRequest) as caught:
        render(source)
    assert caught.value.message.startswith("the model's chat template fails on these messages, in line 2 of the template")
    assert "object" not in caught.value.message
    assert caught.value.param == "messages"


def test_a_template_that_writes_half_a_character_is_reported():
    with pytest.raises(InvalidRequest, match="the prompt has half a character, at character 2"):
        render("{{ messages[0].content }}{{ '\\ud83c' }}")


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{% nonsense %}",
        "{{ 'a' | no_such }}",
        "{% break %}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% generation %}x",
    ],
    ids=["syntax", "tag", "filter", "break", "nested", "no end"],
)
def test_a_template_that_does_not_parse_is_a_checkpoint_error(source):
    with pytest.raises(CheckpointError, match=r"folder/x.jinja: the chat template does not parse: \S+"):
        ChatTemplate(source, {}, origin="folder/x.jinja")


@pytest.mark.parametrize(
    "source",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception.__globals__ }}", "{{ range(10**9) }}"],
)
def test_a_template_cannot_reach_out_of_the_sandbox(source):
    try:
        text = render(source)
    except InvalidRequest:
        return
    assert text == ""  # the sandbox makes the expression undefined, which renders as an empty text


def test_messages_are_values_and_never_source():
    template = "{{ messages[0].content }}"
    assert render(template, [{"role": "user", "content": "{{ 7 * 7 }}"}]) == "{{ 7 * 7 }}"


def test_a_template_may_use_the_helpers_of_hugging_face():
    source = "{{ {'a': 'é<'} | tojson }}{% for m in messages %}{% break %}{% endfor %}{{ strftime_now('%Y') | length }}"
    assert render(source) == '{"a": "é<"}4'


def test_a_prompt_that_grows_too_long_is_refused(monkeypatch):
    template = ChatTemplate("{% for i in range(1000) %}x{{ i }}{% endfor %}", {})
    monkeypatch.setattr(chat, "MAX_PROMPT_CHARS", 100)
    with pytest.raises(InvalidRequest, match="more than 100 characters"):
        template.render(Conversation(messages=USER))


def test_a_rendering_that_looks_up_too_much_is_refused(monkeypatch):
    template = ChatTemplate("{% for m in messages %}{% for n in messages %}{% if n.x.y %}{% endif %}{% endfor %}{% endfor %}", {})
    monkeypatch.setattr(template_environment, "MAX_LOOKUPS", 100 * 100)
    assert template.render(Conversation(messages=[{"role": "user", "x": {}}] * 60)) == ""
    with pytest.raises(InvalidRequest, match="send fewer"):
        template.render(Conversation(messages=[{"role": "user", "x": {}}] * 110))


def test_a_long_rendering_in_a_thread_lets_the_event_loop_run(monkeypatch):
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    conversation = Conversation(messages=USER * 2000)
    pauses = []
    monkeypatch.setattr(template_environment.time, "sleep", pauses.append)
    template.render(conversation)
    assert not pauses  # this is the event loop's thread
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(template.render, conversation).result() == "Hi" * 2000
    assert len(pauses) >= 2000 // template_environment.SHARE_LOOKUPS
