"""Reads what a model folder says of its tokenizer beside tokenizer.json: tokenizer_config.json and the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from server.text.chat import ChatTemplate


def read_config(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no such file. Raises CheckpointError, naming the file."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold one JSON object")
    return config


def token_text(value: Any) -> str | None:
    """The text of a token that a config names by a string, or by an object with its `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def chat_template(folder: Path, config: dict[str, Any], named: dict[str, str]) -> ChatTemplate | None:
    """The template of chat_template.jinja, which wins, or of the config's `chat_template`: a string, or a list of named ones.

    `named` are the special tokens that a template may use by name.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return ChatTemplate(path.read_text(encoding="utf-8"), named, origin=str(path))
    source = config.get("chat_template")
    if isinstance(source, list):
        defaults = (entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default")
        source = next(defaults, {}).get("template")
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: chat_template must be a string")
    return ChatTemplate(source, named, origin=str(folder / "tokenizer_config.json"))
