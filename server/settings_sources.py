"""Reads the settings: flags > TIDEGATE_* environment > YAML file > the defaults of `server.settings.Settings`.

`load_settings` merges them into a Settings. ConfigError is all that it raises: its message names the setting, the value, where
the value comes from, and what would be right.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import EnvSettingsSource

from engine.errors import ConfigError
from server.settings import ENGINE_NAMES, PREFIX, Settings

CONFIG_VARIABLE = "TIDEGATE_CONFIG"  # the path of the YAML file; `--config` has precedence

_ENGINE_NAME = re.compile(rf"\b({'|'.join(map(re.escape, ENGINE_NAMES))})\b")


def load_settings(flags: Mapping[str, object] | None = None, *, config: str | Path | None = None) -> Settings:
    """Merge flags, environment, YAML file and defaults into a Settings. `flags` maps field names to the given values. `config` is
    the path of the YAML file. Raises ConfigError."""
    flags = dict(flags or {})
    unknown = [name for name in os.environ if name.upper().startswith(PREFIX) and not _known_variable(name.upper())]
    if unknown:
        raise ConfigError("\n".join(_unknown_variable(name) for name in sorted(unknown)), param=unknown[0])
    path = config or os.environ.get(CONFIG_VARIABLE) or None
    layers = [
        ({name: flag(name) for name in flags}, flags),
        _environment(),
        _file(Path(path)) if path else ({}, {}),
    ]
    origins: dict[str, str] = {}
    values: dict[str, Any] = {}
    for names, layer in reversed(layers):
        origins |= names
        values |= layer
    try:
        settings = Settings(**values)
    except ValidationError as error:
        problems = error.errors()
        lines = [_explain(problem, origins) for problem in problems]
        raise ConfigError("\n".join(dict.fromkeys(lines)), param=str(problems[0]["loc"][0])) from None
    _check_together(settings, origins)
    return settings


def in_settings_names(message: str) -> str:
    """Replace the engine's names of settings in `message` with the operator's: `cache.block_size` becomes `block_size`."""
    return _ENGINE_NAME.sub(lambda found: ENGINE_NAMES[found[0]], message)


def describe(name: str) -> str:
    """Return in words which values the setting `name` may have, such as "a whole number from 0 to 65535"."""
    kinds = _kinds(name)
    return " or ".join(_in_words(kind) for kind in kinds if kind.get("type") != "null")


def flag(name: str) -> str:
    """Return the command-line flag of the setting `name`: "--max-n" for "max_n"."""
    return "--" + name.replace("_", "-")


_SCHEMA: dict[str, Any] = Settings.model_json_schema()["properties"]


def _kinds(name: str) -> list[dict[str, Any]]:
    schema = _SCHEMA[name]
    kinds: list[dict[str, Any]] = schema.get("anyOf", [schema])
    return kinds


def _check_together(settings: Settings, origins: Mapping[str, str]) -> None:
    """Raise ConfigError if two ports are equal, or if two settings of the engine's steps contradict each other."""
    ports = {name: getattr(settings, name) for name in ("port", "grpc_port", "admin_port")}
    for (one, port), (other, same) in itertools.combinations(ports.items(), 2):
        if port and port == same:
            raise ConfigError(f"{one} and {other} are both {port}: each needs a port of its own", param=other)

    def refuse(name: str, right: str) -> NoReturn:
        origin = origins.get(name, "the defaults")
        raise ConfigError(f"{name} is {getattr(settings, name)} (from {origin}): it must be {right}", param=name)

    if settings.max_step_tokens is not None and settings.max_step_tokens < settings.max_num_seqs:
        refuse("max_step_tokens", f"at least max_num_seqs, which is {settings.max_num_seqs}")
    if settings.max_batch < settings.min_batch:
        refuse("max_batch", f"at least min_batch, which is {settings.min_batch}")
    if settings.step_high_ms <= settings.step_low_ms:
        refuse("step_high_ms", f"more than step_low_ms, which is {settings.step_low_ms}")
    if settings.batching == "model" and settings.cost_file is None:
        refuse("batching", "auto, aimd or fixed, unless cost_file names a file from which times of steps are predicted")


def _in_words(kind: dict[str, Any]) -> str:
    if "enum" in kind:
        return "one of " + ", ".join(kind["enum"])
    if kind["type"] == "boolean":
        return "true or false"
    if kind["type"] == "array":
        return str(kind["items"]["description"])
    if kind["type"] == "string":
        return "a text that is not empty"
    low, high = kind.get("minimum"), kind.get("maximum")
    words = "a whole number" if kind["type"] == "integer" else "a number"
    if "exclusiveMinimum" in kind:
        words += f" greater than {kind['exclusiveMinimum']:g}" + (f" and at most {high:g}" if high is not None else "")
    elif low is not None and high is not None:
        words += f" from {low} to {high}"
    elif low is not None:
        words += f", {low} or more"
    return words


def _environment() -> tuple[dict[str, str], dict[str, Any]]:
    values = EnvSettingsSource(Settings)()
    return {name: PREFIX + name.upper() for name in values}, values


def _file(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config is {str(path)!r}, which cannot be read: {error}", param="config") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}", param="config") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}: it must hold lines of the form `key: value`", param="config")
    return {str(name): str(path) for name in values}, {str(name): value for name, value in values.items()}


def _known_variable(name: str) -> bool:
    return name == CONFIG_VARIABLE or name.removeprefix(PREFIX).lower() in Settings.model_fields


def _unknown_variable(name: str) -> str:
    key = name[len(PREFIX) :].lower()
    return f"{name} is set in the environment, but there is no such setting{_closest(key)}{_service_links(os.environ[name])}"


def _closest(name: str) -> str:
    near = difflib.get_close_matches(name.lower().replace("-", "_"), Settings.model_fields, n=1)
    return f": did you mean {near[0]!r}?" if near else ""


def _service_links(value: object) -> str:
    """Return a hint for an error message if `value` begins with tcp://, else "". Kubernetes sets variables such as
    TIDEGATE_PORT=tcp://... in each pod for a Service named tidegate."""
    if not str(value).startswith("tcp://"):
        return ""
    return " (Kubernetes sets such variables for a Service named tidegate: set enableServiceLinks: false in the pod's spec)"


def _explain(problem: ErrorDetails, origins: Mapping[str, str]) -> str:
    name = str(problem["loc"][0])
    origin = origins.get(name, "the call")
    if name not in Settings.model_fields:
        return f"{name} is set in {origin}, but there is no such setting" + _closest(name)
    value = problem["input"]
    shown = "empty" if value is None else repr(value)
    return f"{name} is {shown} (from {origin}): it must be {describe(name)}" + _service_links(value)
