"""Reads the files of a model folder that describe its tokenizer beside tokenizer.json: tokenizer_config.json, chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from server.text.chat import ChatTemplate


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Returns {} if the file does not exist.

    Raises CheckpointError, naming the file, if it cannot be read or holds no object.
    """
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
    """Return the text of a token that a config gives as a string, or as an object with the text in `content`; else None."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def chat_template(folder: Path, config: dict[str, Any], named: dict[str, str]) -> ChatTemplate | None:
    """Read the model's chat template from chat_template.jinja or, if that file is missing, from the config's `chat_template`.

    The config has a string or a list of named templates, of which "default" is used. Returns None if there is no template.
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
