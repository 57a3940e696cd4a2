"""Compares our rendering of chat templates with transformers' `apply_chat_template`, refusals included.

The templates in tests/support/chat_templates are our own. They use what published templates use; those whose names begin with
"pub-" imitate a published one as a whole. Ours differs on purpose where transformers would lose or garble a message:

- Content comes in a form that the template takes (FORMS): parts are joined by a newline, a string becomes a part.
- `developer` is `system` for a template that does not know developers.
- Where a template fails because a message has no content, the message has an empty one.
- A prompt that continues the last message has no trace of the mark by which both sides find the place where the message ends.
  transformers leaves its mark in further copies of the message.
"""

import datetime
import re
import types
from pathlib import Path

import pytest
from jinja2 import TemplateError

from engine.errors import CheckpointError, InvalidRequest, UnsupportedField
from server.bundled import FOLDER
from server.text import template_environment
from server.text.chat import ChatTemplate
from server.text.conversation import Conversation

FILES = Path(__file__).resolve().parents[3] / "support" / "chat_templates"
TEMPLATES = {path.stem: path.read_text() for path in sorted(FILES.glob("*.jinja"))}
TOKENS = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "sep_token": "<|user|>", "pad_token": "<|end|>"}

# Forms of content that a template takes, for all roles or by role: "text" (if a template is not listed), "parts", "both", or for
# templates that show only the first part of a list "one" (or text) and "only one".
FORMS = {
    "loop-over-parts": "parts",
    "string-or-parts": "both",
    "iterable-not-string": "both",
    "macro-content": "both",
    "macro-parts-only": "parts",
    "map-attribute": "parts",
    "first-part": "only one",
    "mixed-by-role": {"user": "parts", "assistant": "one"},
    "pub-llama-3.2-vision": {"user": "both", "assistant": "both"},
    "pub-mistral-small-3.1": {"system": "one", "user": "both", "assistant": "one"},
    "pub-gemma-3": {"system": "one", "user": "both", "assistant": "both"},
    "pub-glm-4.5": "both",
    "pub-llama-guard-4": {"user": "both", "assistant": "both"},
}
KNOW_DEVELOPERS = {"knows-developer", "pub-harmony"}
NEED_TOOLS = {"pub-hermes-tools"}  # both sides refuse, since there are none


def text(*texts):
    return [{"type": "text", "text": text} for text in texts]


def chat(*turns):
    return [{"role": {"s": "system", "d": "developer", "u": "user", "a": "assistant"}[role], "content": c} for role, c in turns]


SHORT = chat(("u", "Hello there"))
LONG = chat(("s", "Be brief."), ("u", "What is a tide?"), ("a", "The sea's rise and fall."), ("u", "Thanks"))
THOUGHT = "<think>\nsome thought\n</think>\n\nThe answer"
CONTINUED = {"add_generation_prompt": False, "continue_final_message": True}
CONVERSATIONS = {
    "one message": (SHORT, {}),
    "a system message": (chat(("s", "Be brief."), ("u", "Hi")), {}),
    "several turns": (LONG, {}),
    "an answer at the end": (LONG[:3], {"add_generation_prompt": False}),
    "an answer at the end and a prompt": (LONG[:3], {}),
    "a developer": (chat(("d", "Be kind."), ("u", "Hi")), {}),
    "one part": (chat(("s", text("Be brief.")), ("u", text("Hi"))), {}),
    "several parts": (
        chat(("s", text("Be", "brief.")), ("u", text("one", "two", "three")), ("a", text("four", "five")), ("u", text("x"))), {}
    ),
    "parts and strings": (chat(("s", "Be brief."), ("u", text("one", "two")), ("a", "four"), ("u", "five")), {}),
    "no content": ([*LONG[1:2], {"role": "assistant", "content": None}, *LONG[3:]], {}),
    "empty content": (chat(("s", ""), ("u", ""), ("a", ""), ("u", " \n ")), {}),
    "two users": (chat(("u", "a"), ("u", "b"), ("a", "c"), ("u", "d")), {}),
    "two systems": (chat(("s", "a"), ("s", "b"), ("u", "c"), ("s", "d"), ("u", "e")), {}),
    "an assistant first": (chat(("a", "Welcome"), ("u", "Hi")), {}),
    "names": ([{"role": "user", "content": "Hi", "name": "ann"}, {"role": "assistant", "content": "Yes?", "name": None}], {}),
    "reasoning": (
        [LONG[1], {**chat(("a", "Sea."))[0], "reasoning_content": "Think\nhard"}, LONG[3], *chat(("a", THOUGHT))],
        {"add_generation_prompt": False},
    ),
    "a thought in the text": (chat(("u", "q"), ("a", THOUGHT), ("u", "r")), {}),
    "thinking switched off": (LONG, {"variables": {"enable_thinking": False, "thinking": True, "controls": {"length": "short"}}}),
    "thinking switched on": (SHORT, {"variables": {"enable_thinking": True, "date_string": "1 Jan 2025", "bos_token": "<B>"}}),
    "variables": (
        SHORT, {"variables": {"custom_tools": [], "model_identity": "I", "builtin_tools": ["x"], "categories": {"a": 1}}}
    ),
    "an effort": (SHORT, {"variables": {"reasoning_effort": "high", "excluded_category_keys": ["S1"]}}),
    "documents": (LONG, {"documents": [{"title": "the TIDE", "text": " It rises.\n" * 3}, {"text": "x"}]}),
    "no documents": (SHORT, {"documents": []}),
    "special characters": (
        chat(("s", " é <b> & \"'\\ {{ x }} {% \n"), ("u", "\t🌊 日本語\r\n%s {0} "), ("a", "\x00\u2028</s>"), ("u", "<|end|>")),
        {},
    ),
    "continued": (LONG[:3], CONTINUED),
    "continued at a space": (chat(("u", "Hi"), ("a", " I think that ")), CONTINUED),
    "continued in a part": (chat(("u", text("Hi")), ("a", text("I", "think"))), CONTINUED),
    "continued from nothing": (chat(("u", "Hi"), ("a", "")), CONTINUED),
}  # fmt: skip


@pytest.fixture(scope="module")
def reference():
    """The reference tokenizer. transformers takes a second to import; it needs no torch for this."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(FOLDER / "tokenizer.json"), **TOKENS)


@pytest.fixture
def one_moment(reference, monkeypatch):
    """Stop the clock of both sides."""
    from transformers.utils import chat_template_utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2026, 1, 9, 23, 59, 58, tzinfo=tz)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    monkeypatch.setattr(template_environment, "datetime", types.SimpleNamespace(datetime=Clock))


def adapted(name, messages):
    """Return `messages` as the template `name` is meant to get them."""
    forms, made = FORMS.get(name, "text"), []
    for message in messages:
        role, content = message["role"], message.get("content")
        if role == "developer" and name not in KNOW_DEVELOPERS:
            role = "system"
        form = forms if isinstance(forms, str) else forms.get(role, "text")
        if isinstance(content, list) and (form == "text" or (form in ("one", "only one") and len(content) > 1)):
            content = "\n".join(part["text"] for part in content)
        if isinstance(content, str) and form in ("parts", "only one"):
            content = text(content)
        made.append({**message, "role": role, "content": content})
    return made


def theirs(reference, source, messages, variables=None, **options):
    """Return what transformers renders, or the error that it raises."""
    options = {"add_generation_prompt": True, **options, **(variables or {})}
    try:
        prompt = reference.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
        return re.sub("CONTINUE_FINAL_MESSAGE_TAG ?", "", prompt, flags=re.IGNORECASE)
    except (
        TemplateError,
        SyntaxError,
        TypeError,
        ValueError,
        LookupError,
        ArithmeticError,
        AttributeError,
        RuntimeError,
    ) as error:
        return error


def expected(reference, name, messages, options):
    wanted = adapted(name, messages)
    result = theirs(reference, TEMPLATES[name], wanted, **options)
    if isinstance(result, Exception) and type(result) is not TemplateError and any(m["content"] is None for m in wanted):
        filled = adapted(name, [{**message, "content": message["content"] or ""} for message in messages])
        result = theirs(reference, TEMPLATES[name], filled, **options)
    return result


def ours(template, messages, options):
    try:
        return template.render(Conversation(messages=messages, **options))
    except (InvalidRequest, UnsupportedField) as error:
        return error


@pytest.mark.usefixtures("one_moment")
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_rendered_as_transformers_renders_it(reference, name):
    template = ChatTemplate(TEMPLATES[name], TOKENS)
    shown = 0
    for about, (messages, options) in CONVERSATIONS.items():
        result = ours(template, messages, options)
        if isinstance(result, UnsupportedField):
            assert "documents" not in TEMPLATES[name], about
            continue
        reference_result = expected(reference, name, messages, options)
        if isinstance(reference_result, Exception):
            assert isinstance(result, InvalidRequest), (about, result, reference_result)
            if type(reference_result) is TemplateError:
                assert result.message.endswith(f"refuses these messages: {reference_result}"), about
        else:
            assert result == reference_result, (about, messages)
            shown += 1
    assert shown >= 4 or name in NEED_TOOLS


def test_there_are_enough_templates_and_conversations():
    assert len(TEMPLATES) >= 75
    assert len(CONVERSATIONS) >= 16


REFUSED = ["{% if %}", "{% nonsense %}", "{{ 'a' | no_such }}", "{% break %}", "{% generation %}x", "{{ x"]


@pytest.mark.parametrize("source", REFUSED)
def test_what_transformers_does_not_parse_is_not_parsed(reference, source):
    assert isinstance(theirs(reference, source, SHORT), Exception)
    with pytest.raises(CheckpointError):
        ChatTemplate(source, TOKENS)
