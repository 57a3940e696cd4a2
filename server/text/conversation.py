"""Conversation: messages of a client, and how to render them with a chat template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

_WEIGHT = 32  # a message or another value costs about as much work as this many characters of text
Message = Mapping[str, Any]
"""Has `role`, and usually `content`: a string, or a list of {"type": "text", "text": ...}. A field that is None is left out."""


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """What a client wants to have rendered. All values are plain JSON."""

    messages: Sequence[Message]
    template: str | None = None  # name of one of the model's templates; None is the default
    variables: Mapping[str, Any] = {}  # further names for the template
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False  # the prompt ends inside the last message, so that the model continues it

    def inputs(self) -> Iterator[tuple[str, Any]]:
        """Yield everything that a client wrote, each with the name of its field."""
        yield from ((f"messages[{i}]", message) for i, message in enumerate(self.messages))
        yield "chat_template_kwargs", self.variables
        yield "documents", self.documents
        yield "reasoning_effort", self.reasoning_effort

    def weight(self, largest: int) -> int:
        """Return the work of rendering, in characters of text. Counting ends above `largest`."""
        weight = 0
        for _, value in self.inputs():
            for leaf in _leaves(value):
                weight += _WEIGHT + (len(leaf) if isinstance(leaf, str) else 0)
                if weight > largest:
                    return weight
        return weight


def strings_in(value: Any) -> Iterator[str]:
    """Yield all strings in a JSON value, the keys of objects included."""
    return (leaf for leaf in _leaves(value) if isinstance(leaf, str))


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the keys and the values of a JSON value that are not lists or objects; each list and each object counts as None."""
    waiting = [iter((value,))]
    while waiting:
        for item in waiting[-1]:
            if isinstance(item, Mapping):
                yield from item
                waiting.append(iter(item.values()))
                yield None
                break
            if isinstance(item, list):
                waiting.append(iter(item))
                yield None
                break
            yield item
        else:
            waiting.pop()
