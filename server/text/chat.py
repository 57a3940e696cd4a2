"""Renders a conversation to one prompt with a chat template of the model, as transformers' `apply_chat_template` renders it.

The template comes from the model folder, which the operator chose. Clients' texts reach it only as values, never as source.
What a template gets differs from transformers in three ways, each of which only turns a lost message into one that is shown:

- Content is given in the form that the template takes (`content_forms.py`): a list of parts, or the parts joined by a newline.
- The role `developer` becomes `system` if the template does not know `developer`.
- A template that fails because a message has no content gets an empty content instead.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError, nodes
from jinja2.exceptions import SecurityError
from jinja2.meta import find_undeclared_variables

from engine.errors import CheckpointError, InvalidRequest, UnsupportedField
from server.text.content_forms import TEXT, ContentForm, find_form, in_form
from server.text.conversation import Conversation, Message
from server.text.template_environment import (
    FAILURES,
    MAX_LOOKUPS,
    TEMPLATE_FILE,
    TemplateEnvironment,
    TemplateRefusal,
    TooMuchWork,
    bounded_work,
)

MAX_PROMPT_CHARS = 1 << 24
DEFAULT_EFFORT = "medium"  # OpenAI's default of reasoning_effort: asking for it asks for nothing
ROLES = ("system", "developer", "user", "assistant")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field in templates of different families


class ChatTemplate:
    def __init__(self, source: str, tokens: Mapping[str, str], *, origin: str = "the chat template") -> None:
        """Parse the template `source`. `tokens` are the special tokens that it may use by name, such as `bos_token`.

        Raises CheckpointError, naming `origin` and the line, if the template does not parse.
        """
        environment = TemplateEnvironment()
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
            self.variables = frozenset(find_undeclared_variables(tree))
        except (TemplateError, SyntaxError, RecursionError, ValueError, MemoryError) as error:
            raise CheckpointError(f"{origin}: the chat template does not parse: {_parse_fault(error)}") from error
        self._names_content = "content" in source
        self._knows_developer = _has_constant(tree, "developer")
        self._fixed = {**tokens, "tools": None, "documents": None}
        self._forms = {role: find_form(self._run, role, self._fixed) for role in ROLES}

    def render(self, conversation: Conversation) -> str:
        """Render `conversation` to one prompt, with the model's special tokens as text.

        Raises InvalidRequest if the template refuses the messages or fails, and UnsupportedField if the conversation has
        something that the template does not use.
        """
        context = self._context(conversation)
        messages = [self._message(message) for message in conversation.messages]
        forms = self._forms_of(messages, context)
        messages = [in_form(message, forms[message["role"]]) for message in messages]
        try:
            try:
                return self._finish(messages, context, conversation)
            except FAILURES:
                if all("content" in message for message in messages):
                    raise
            messages = [{**in_form({"content": ""}, forms[message["role"]]), **message} for message in messages]
            return self._finish(messages, context, conversation)
        except TemplateRefusal as refusal:
            raise InvalidRequest(f"the model's chat template refuses these messages: {refusal}", param="messages") from refusal
        except TooMuchWork as error:
            raise InvalidRequest(
                f"the model's chat template needs more than {MAX_LOOKUPS} lookups for these messages: send fewer",
                param="messages",
            ) from error
        except FAILURES as error:
            # A template expects messages of a certain shape. On other messages it may fail with any of these errors.
            message = f"the model's chat template fails on these messages{_place(error)}{_reason(error)}"
            raise InvalidRequest(message, param="messages") from error

    def _context(self, conversation: Conversation) -> dict[str, Any]:
        """Return the names that the template gets, apart from `messages`."""
        effort = conversation.reasoning_effort
        for name, is_asked in (("documents", conversation.documents), ("reasoning_effort", effort not in (None, DEFAULT_EFFORT))):
            if is_asked and name not in self.variables:
                raise UnsupportedField(f"this model's chat template does not use {name}: leave it out", param=name)
        return {
            **self._fixed,
            **({} if effort is None else {"reasoning_effort": effort}),
            **conversation.variables,
            "tools": None,
            "documents": conversation.documents,
            "add_generation_prompt": conversation.add_generation_prompt,
        }

    def _message(self, message: Message) -> dict[str, Any]:
        """Return `message` as the template gets it, apart from the form of its content."""
        made = {name: value for name, value in message.items() if value is not None}
        if made.get("role") == "developer" and not self._knows_developer:
            made["role"] = "system"
        reasoning = next((made[name] for name in _REASONING if name in made), None)
        if reasoning is not None:
            made = {"thinking": reasoning, **made, "reasoning_content": reasoning}
        return made

    def _forms_of(self, messages: list[dict[str, Any]], context: dict[str, Any]) -> dict[str, ContentForm]:
        """Return the form of content for each role in `messages`."""
        forms = {role: self._forms.get(role) for role in {message["role"] for message in messages}}
        own_names = any(self._fixed.get(name) is not value for name, value in context.items() if name != "add_generation_prompt")
        for role, form in forms.items():
            if form is None and role in self._forms and own_names:
                # The template showed no message of this role when it was tried. The client's own names may make the difference.
                forms[role] = find_form(self._run, role, context)
        return {role: form or TEXT for role, form in forms.items()}

    def _finish(self, messages: list[dict[str, Any]], context: dict[str, Any], conversation: Conversation) -> str:
        if not conversation.continue_final_message:
            return self._run(messages, context)
        # No client knows the number, so no message contains it, and no filter for letters changes it.
        mark = str(secrets.randbelow(9 * 10**25) + 10**25)
        text, marked = _with_mark(messages, f"{mark} ")
        prompt = self._run(marked, context)
        at = prompt.rfind(mark)
        if at < 0 or text.strip() not in prompt or not self._names_content:
            raise InvalidRequest(
                "the model's chat template does not show the text of the last message as it is, so it cannot be continued",
                param="continue_final_message",
            )
        # If the template has removed the space after the mark, it would also have removed white space at the end of the text.
        keeps_space = prompt.startswith(f"{mark} ", at)
        prompt = re.sub(f"{mark} ?" if keeps_space else mark, "", prompt[:at])  # the template may show the text several times
        return prompt if keeps_space else prompt.rstrip()

    def _run(self, messages: list[dict[str, Any]], context: Mapping[str, Any]) -> str:
        parts: list[str] = []
        size = 0
        with bounded_work():
            for part in self._template.generate({**context, "messages": messages}):
                parts.append(part)
                size += len(part)
                if size > MAX_PROMPT_CHARS:
                    raise TemplateRefusal(f"the prompt has more than {MAX_PROMPT_CHARS} characters")
        prompt = "".join(parts)
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # an escape in a template's string can write half a surrogate pair
            raise TemplateRefusal(f"the prompt has half a character, at character {error.start}") from error
        return prompt


def _with_mark(messages: list[dict[str, Any]], mark: str) -> tuple[str, list[dict[str, Any]]]:
    """Return the last text of the last message, and the messages with `mark` after that text."""
    last = messages[-1]
    content = last.get("content")
    if not content and content != "":
        raise InvalidRequest(
            "continue_final_message may only be given if the last message has content", param="continue_final_message"
        )
    if isinstance(content, str):
        return content, [*messages[:-1], {**last, "content": content + mark}]
    text = content[-1]["text"]
    return text, [*messages[:-1], {**last, "content": [*content[:-1], {**content[-1], "text": text + mark}]}]


def _has_constant(tree: nodes.Template, text: str) -> bool:
    """Return whether the template compares with `text`: it is a string of its own, or a word of a string that `in` looks into."""
    if any(node.value == text for node in tree.find_all(nodes.Const)):
        return True
    looked_into = (op.expr for op in tree.find_all(nodes.Operand) if op.op in ("in", "notin"))
    return any(isinstance(expr, nodes.Const) and text in str(expr.value) for expr in looked_into)


def _parse_fault(error: Exception) -> str:
    """Return the line and the reason of an error in a template's source."""
    if isinstance(error, TemplateSyntaxError):
        reason = (error.message or "wrong syntax").splitlines()[0]
        return f"line {error.lineno}: {reason[:1].lower() + reason[1:]}"
    if isinstance(error, SyntaxError):  # Jinja makes Python of a template, and Python refuses it
        return str(error.msg)
    return "it is nested too deeply" if isinstance(error, RecursionError | MemoryError) else str(error)


def _reason(error: BaseException) -> str:
    """Return what a template did wrong, in our words: those of the libraries speak of their own types."""
    if isinstance(error, SecurityError):
        return ": it does what the sandbox forbids"
    if isinstance(error, UndefinedError):
        return ": it needs a value that is missing"
    return ": a value is not of the type that it needs" if isinstance(error, TypeError) else ""


def _place(error: BaseException) -> str:
    """Return " in line N of the template" for an error that a template raised, or "" if the line is not known."""
    lines = [at.tb_lineno for at in _traceback(error) if at.tb_frame.f_code.co_filename == TEMPLATE_FILE]
    return f", in line {lines[-1]} of the template" if lines else ""


def _traceback(error: BaseException) -> Iterator[TracebackType]:
    at = error.__traceback__
    while at is not None:
        yield at
        at = at.tb_next
