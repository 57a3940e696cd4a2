"""Finds out in which forms a chat template takes the content of a role's messages: as a string, as a list of parts, or as both.

Some templates print content as it is, and would print a list as Python writes it. Others loop over parts, and would show nothing
of a string. Many do both, and not the same for every role. Reading the template does not tell: content passes through variables,
macros, filters and branches that depend on the role and the place of a message. So the template is tried: it renders short
conversations with a known text in one message, once in each form. It takes a form if the text comes out, without the rest of
the part's object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from server.text.template_environment import RENDER_ERRORS

Render = Callable[[list[dict[str, Any]], Mapping[str, Any]], str]

_TEXTS = ("qzjxkvwq", "wqvkxzjw")  # no template prints these by itself; letters, since templates trim and split
_KEY = "zqkey"  # a key of each part that no template reads: it comes out only if a template prints the whole part
_ANY = 1 << 30
# Conversations to try, as the first letters of the roles; the message with the known text has a capital letter.
_SHAPES = {
    "user": ("U", "sU", "Uau", "uaU"),
    "system": ("Su", "Suau"),
    "developer": ("Du", "Duau"),
    "assistant": ("uA", "uAu", "suAu"),
}
_ROLES = {role[0]: role for role in _SHAPES}


class ContentForm(msgspec.Struct, frozen=True):
    takes_text: bool
    most_parts: int  # parts of a list that the template shows: none, one or any number


TEXT = ContentForm(takes_text=True, most_parts=0)


def in_form(message: dict[str, Any], form: ContentForm) -> dict[str, Any]:
    """Return `message` with its content in a form that the template takes. A list that it does not take is joined by newlines."""
    content = message.get("content")
    if isinstance(content, list) and len(content) > form.most_parts:
        content = "\n".join(part["text"] for part in content)
    if isinstance(content, str) and not form.takes_text:
        content = [{"type": "text", "text": content}]
    return message if content is message.get("content") else {**message, "content": content}


def find_form(render: Render, role: str, names: Mapping[str, Any]) -> ContentForm | None:
    """Return the form of content in messages of `role`; None if `render` shows no text of that role in any form.

    `render` renders messages with further names for the template. `names` are those of the client.
    """
    taken = [kinds for shape in _SHAPES[role] if any(kinds := tuple(_kinds_taken(render, shape, names)))]
    if not taken:
        return None
    texts, ones, anys = (sum(kind) for kind in zip(*taken, strict=True))
    takes_text = texts == len(taken) or texts >= ones
    enough = len(taken) if takes_text else 1  # a list is needed where text is not taken, even if it is not always shown
    return ContentForm(takes_text, _ANY if anys >= max(enough, ones) else 1 if ones >= enough else 0)


def _kinds_taken(render: Render, shape: str, names: Mapping[str, Any]) -> Iterator[bool]:
    """Yield for a string, for one part, and for two parts, whether the template shows them in the conversation `shape`."""
    for num_parts in (0, 1, 2):
        # The other messages may have to be in the other form.
        yield any(_shows(render, shape, num_parts, others, names) for others in (num_parts, 0 if num_parts else 1))


def _shows(render: Render, shape: str, num_parts: int, others: int, names: Mapping[str, Any]) -> bool:
    messages = [
        {
            "role": _ROLES[letter.lower()],
            "content": _content(_TEXTS, num_parts) if letter.isupper() else _content(("x", "y"), others),
        }
        for letter in shape
    ]
    try:
        prompt = render(messages, {**names, "add_generation_prompt": shape[-1] in "uU"}).casefold()
    except RENDER_ERRORS:
        return False
    return _KEY not in prompt and all(text in prompt for text in _TEXTS[: max(num_parts, 1)])


def _content(texts: tuple[str, ...], num_parts: int) -> str | list[dict[str, str]]:
    return [{"type": "text", "text": text, _KEY: _KEY} for text in texts[:num_parts]] if num_parts else texts[0]
