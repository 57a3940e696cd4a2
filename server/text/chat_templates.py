"""Reads the chat templates of a model folder. A template that cannot be used costs chats and nothing else: the server starts.

The places are those of transformers, and the first that has a template is the only one:

1. `chat_template.jinja`, which is the default, and `additional_chat_templates/NAME.jinja`
2. `chat_template` in tokenizer_config.json: one template, a list of {"name", "template"}, or an object from name to template
3. `chat_template` in chat_template.json, then in processor_config.json, where folders of models that also take images have it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import CheckpointError, InvalidRequest, UnsupportedField
from server.text.chat import ChatTemplate
from server.text.model_files import read_config, read_fault

DEFAULT = "default"
_SHOWN_NAMES = 8  # names of templates that an error message lists


class _Source(NamedTuple):
    name: str
    text: Any
    origin: Path


class ChatTemplates:
    """The chat templates of one model by name."""

    def __init__(self, templates: Mapping[str, ChatTemplate], faults: Mapping[str, str] | None = None) -> None:
        """`faults` has the names of the templates that cannot be used, and why. The name "" stands for all of them."""
        self._templates = dict(templates)
        self._faults = dict(faults or {})

    @classmethod
    def of(cls, template: ChatTemplate | None) -> ChatTemplates:
        """Return the templates of a model that has one template or none."""
        return cls({} if template is None else {DEFAULT: template})

    @classmethod
    def from_folder(cls, folder: Path, config: dict[str, Any], tokens: Mapping[str, str]) -> ChatTemplates:
        """Read all templates of a model folder. `config` is its tokenizer_config.json, and `tokens` are the special tokens that a
        template may use by name."""
        templates: dict[str, ChatTemplate] = {}
        faults: dict[str, str] = {}
        try:
            sources = {source.name: source for source in _sources(folder, config)}
        except CheckpointError as error:
            return cls({}, {"": _without(folder, error)})
        for name, source in sources.items():
            try:
                if not isinstance(source.text, str):
                    raise CheckpointError(f"{source.origin}: the chat template {name!r} must be a string")
                templates[name] = ChatTemplate(source.text, tokens, origin=str(source.origin))
            except CheckpointError as error:
                faults[name] = _without(folder, error)
        return cls(templates, faults)

    @property
    def problems(self) -> list[str]:
        """What is wrong, for the operator: a sentence for each template that cannot be used, and one for a missing default."""
        found = [*self._faults.values()]
        if self.names and DEFAULT not in self.names:
            found.append(f"none of the named chat templates ({self._listed}) is called {DEFAULT!r}")
        elif not self.names and not found:
            found.append("the model has no chat template")
        return found

    @property
    def names(self) -> list[str]:
        """The names of all templates of the folder, those that cannot be used included."""
        return sorted({*self._templates, *self._faults} - {""})

    @property
    def default(self) -> ChatTemplate | None:
        return self._templates.get(DEFAULT)

    def find(self, name: str | None, model: str) -> ChatTemplate:
        """Return the template `name`, or the default if it is None. Raises InvalidRequest or UnsupportedField, which says why
        `model` has no such template."""
        template = self._templates.get(DEFAULT if name is None else name)
        if template is None:
            raise self._refusal(name, model)
        return template

    def _refusal(self, name: str | None, model: str) -> InvalidRequest | UnsupportedField:
        param = "messages" if name is None else "chat_template"
        fault = self._faults.get(DEFAULT if name is None else name, self._faults.get(""))
        if fault is not None:
            return InvalidRequest(f"{model} cannot answer messages: {fault}", param=param)
        if not self.names:
            return InvalidRequest(f"{model} has no chat template, so it cannot answer messages: use /v1/completions", param=param)
        if name is None:
            return InvalidRequest(
                f"{model} has named chat templates, and none of them is the default: give chat_template, one of {self._listed}",
                param="chat_template",
            )
        if "{" in name:
            return UnsupportedField(
                f"this server takes no template from a request: chat_template must be one of {self._listed}", param=param
            )
        return InvalidRequest(f"chat_template must be the name of a template of {model}: one of {self._listed}", param=param)

    @property
    def _listed(self) -> str:
        names = self.names
        return ", ".join(names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")


def _without(folder: Path, error: CheckpointError) -> str:
    """Return the error's message without the path of the folder, which clients are not told."""
    return error.message.replace(f"{folder}/", "")


def _sources(folder: Path, config: dict[str, Any]) -> list[_Source]:
    """Return the templates of the first place that has one. Raises CheckpointError, naming the file."""
    if files := list(_files(folder)):
        return [_Source(name, _read_text(path), path) for name, path in files]
    if found := _from_config(config, folder / "tokenizer_config.json"):
        return found
    for name in ("chat_template.json", "processor_config.json"):
        if found := _from_config(read_config(folder / name), folder / name):
            return found
    return []


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    default = folder / "chat_template.jinja"
    if default.is_file():
        yield DEFAULT, default
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        yield path.name.removesuffix(".jinja"), path


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: the chat template cannot be read: {read_fault(error)}") from error


def _from_config(config: dict[str, Any], path: Path) -> list[_Source]:
    given = config.get("chat_template")
    if given is None:
        return []
    if isinstance(given, str):
        given = {DEFAULT: given}
    elif isinstance(given, list) and all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in given):
        given = {entry["name"]: entry.get("template") for entry in given}
    if not isinstance(given, dict):
        raise CheckpointError(
            f'{path}: chat_template must be a template, a list of {{"name", "template"}}, or an object from name to template'
        )
    return [_Source(name, text, path) for name, text in given.items()]
