"""Renders chat messages to one prompt with the model's chat template: Jinja as Hugging Face uses it, in a sandbox.

The template comes from the model folder, which the operator chose. Clients' texts reach it only as values, never as source.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import CheckpointError, InvalidRequest

MAX_PROMPT_CHARS = 1 << 24
Message = Mapping[str, Any]
"""Has `role` and `content`. The content is a string, or a list of {"type": "text", "text": ...}."""


class _Refusal(Exception):
    """Raised when a chat template calls `raise_exception`. It carries the template's message."""


class ChatTemplate:
    def __init__(self, source: str, tokens: Mapping[str, str], *, origin: str = "the chat template") -> None:
        """Parse the template `source`. `tokens` are the special tokens that it may use by name, such as `bos_token`.

        Raises CheckpointError, naming `origin` and the line, if the template does not parse.
        """
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._tokens = dict(tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(f"{origin}: the chat template does not parse, line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Render `messages` to one prompt, with the model's special tokens as text.

        Raises InvalidRequest if the template refuses the messages or fails.
        """
        plain = [{**message, "content": _plain_text(message.get("content"))} for message in messages]
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(messages=plain, add_generation_prompt=add_generation_prompt, **self._tokens):
                parts.append(part)
                size += len(part)
                if size > MAX_PROMPT_CHARS:
                    raise _Refusal(f"the prompt has more than {MAX_PROMPT_CHARS} characters")
        except _Refusal as refusal:
            raise InvalidRequest(f"the model's chat template refuses these messages: {refusal}", param="messages") from refusal
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
            # A template expects messages of a certain shape. On other messages it may fail with any of these errors.
            raise InvalidRequest(f"the model's chat template cannot take these messages: {error}", param="messages") from error
        return "".join(parts)


def _plain_text(content: Any) -> Any:
    """Join a message's content to one string if it is a list of parts, since most templates cannot handle a list."""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, Mapping))
    return content


def _raise_exception(message: str) -> str:
    raise _Refusal(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    """Format `value` as JSON, like Hugging Face's `tojson` filter. Jinja's own filter would escape <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().astimezone().strftime(format)
