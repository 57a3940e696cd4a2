"""Reads the files of a model folder that describe its tokenizer beside tokenizer.json: its config and its named tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Returns {} if the file does not exist.

    Raises CheckpointError, naming the file, if it cannot be read or holds no object.
    """
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {read_fault(error)}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold one JSON object")
    return config


def read_fault(error: Exception) -> str:
    """Return in our words why a file cannot be read. Clients see it too, if the file has a chat template."""
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON, at line {error.lineno}, column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8, at byte {error.start}"
    if isinstance(error, OSError):
        return (error.strerror or "an error of the system").lower()
    return "it is nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def token_text(value: Any) -> str | None:
    """Return the text of a token that a config gives as a string, or as an object with the text in `content`; else None."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def named_tokens(folder: Path, config: dict[str, Any], *, padding: str | None = None) -> dict[str, str]:
    """Return the special tokens that a model folder names, such as `bos_token`, wherever it names them. Templates use the names.

    `config` is tokenizer_config.json. `padding` is the token of tokenizer.json's padding, the pad token if no file names another.
    As in transformers, special_tokens_map.json has precedence, unless the config lists the added tokens: then the config has it.
    """
    own = {name: value for name, value in config.items() if name.endswith("_token")}
    own |= config.get("model_specific_special_tokens") or {}
    further = config.get("extra_special_tokens") or config.get("additional_special_tokens")  # two names of one key
    own |= further if isinstance(further, dict) else {}
    mapped = dict(read_config(folder / "special_tokens_map.json"))
    further = mapped.pop("extra_special_tokens", None)
    mapped = {name: value for name, value in mapped.items() if name.endswith("_token")}
    mapped |= further if isinstance(further, dict) else {}
    named = {"pad_token": padding} | (mapped | own if "added_tokens_decoder" in config else own | mapped)
    return {name: text for name, value in named.items() if (text := token_text(value)) is not None}
