"""Finds the tokens that end a turn: those that the tokenizer's files name, and the one that the chat template writes.

config.json and generation_config.json name such tokens too; the engine reads those (`engine/models/config_common.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import tokenizers

from engine.errors import InvalidRequest
from server.text.chat import ChatTemplate
from server.text.conversation import Conversation, Message
from server.text.model_files import read_config, token_text

_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_ANSWER = "TIDEGATE-ANSWER"
_TURNS: list[Message] = [
    {"role": "user", "content": "TIDEGATE-QUESTION"},
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": "TIDEGATE-QUESTION"},
]


def find_end_tokens(folder: Path, tokenizer: tokenizers.Tokenizer, chat: ChatTemplate | None) -> dict[int, str]:
    """Return the ids of the tokens that end a turn, and for each of them the names of the files that say so."""
    found: dict[int, str] = {}
    for name in _FILES:
        text = token_text(read_config(folder / name).get("eos_token"))
        token = None if text is None else tokenizer.token_to_id(text)
        if token is not None:
            found[token] = f"{found[token]}, {name}" if token in found else name
    if chat is not None:
        special = {str(token): id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        token = template_end(chat, special)
        if token is not None:
            found[token] = f"{found[token]}, chat template" if token in found else "chat template"
    return found


def template_end(chat: ChatTemplate, special: Mapping[str, int]) -> int | None:
    """Return the special token that the chat template writes after every assistant message; None if there is none for certain.

    `special` maps the texts of the special tokens to their ids. The token must follow the message, but for white space, both at
    the end of a conversation and before another message. So a token that begins the next turn, or closes only the last one, is
    not taken for the end of every turn. The result is None too if the template refuses such conversations.
    """
    try:
        ends = {_token_after_answer(chat.render(_turns(num)), special) for num in (2, 3)}
    except InvalidRequest:
        return None
    return ends.pop() if len(ends) == 1 else None


def _turns(num: int) -> Conversation:
    return Conversation(messages=_TURNS[:num], add_generation_prompt=False)


def _token_after_answer(text: str, special: Mapping[str, int]) -> int | None:
    _, found, rest = text.rpartition(_ANSWER)
    rest = rest.lstrip()
    texts = [token for token in special if found and token and rest.startswith(token)]
    return special[max(texts, key=len)] if texts else None
