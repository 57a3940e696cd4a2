"""Typed, checked look-ups in a checkpoint's JSON. Each failure is a CheckpointError that names file, key, value and remedy.

A reader remembers which keys were looked up, so that `config_keys.py` can judge the keys that no code has read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from engine.errors import CheckpointError

# These limits are far above every known model. A larger number would fail later without naming its key: in an allocation that
# no machine can serve, in a list of layers that takes hours to build, or in a float that overflows.
MAX_SIZE = 1 << 18
LEAST, MOST = 1e-15, 1e15

MAX_SHOWN = 200  # a message shows this many characters of a refused value
_REQUIRED: Any = object()


class ConfigReader:
    """Reads typed values from one JSON object of the file `source`. `path` is the object's place in the file ("" at the top).

    A key that is absent has its value in `defaults`, the family's own. `spelling` maps a key to another name that the file uses
    for it. `inherited` are keys that stand in the object around this one, at the top.

    Each method raises CheckpointError, naming the key, its value and what would be right.
    """

    def __init__(
        self,
        data: dict[str, Any],
        source: str,
        path: str = "",
        *,
        defaults: dict[str, Any] | None = None,
        spelling: dict[str, str] | None = None,
        inherited: frozenset[str] = frozenset(),
    ) -> None:
        self.given = data
        self.source = source
        self.path = path
        self.sections: dict[str, ConfigReader] = {}  # the objects inside this one that were looked up
        self.notes: list[str] = []  # what the log has to say about this object
        self.inherited = inherited
        self._defaults = defaults or {}
        self._spelling = spelling or {}
        self._read: set[str] = set()

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise CheckpointError for `key`. `why` completes the sentence "key is value: ..."."""
        name = self._place(key) + self._spelling.get(key, key)
        raise CheckpointError(f"{self.source}: {name} {self._state(key)}: {why}", param=name)

    def _place(self, key: str) -> str:
        return "" if key in self.inherited else self.path

    def _state(self, key: str) -> str:
        name = self._spelling.get(key, key)
        if name in self.given:
            return f"is {shown(self.given[name])}"
        return f"is {shown(self._defaults[key])} by default" if self._defaults.get(key) is not None else "is missing"

    def note(self, text: str) -> None:
        """Say `text` in the log when the engine starts."""
        self.notes.append(f"{self.source}: {text}")

    def get(self, key: str) -> Any:
        """Return the value of `key` as it is in the file, its default if it is absent, or None."""
        name = self._spelling.get(key, key)
        self._read |= {key, name}
        return self.given[name] if name in self.given else self._defaults.get(key)

    def has(self, key: str) -> bool:
        """Whether `key` has a value that is not null, in the file or by default."""
        return self.get(key) is not None

    def has_default(self, key: str) -> bool:
        """Whether the family itself has the key, whatever the file says."""
        return key in self._defaults

    def is_given(self, key: str) -> bool:
        """Whether the file itself has a value for `key` that is not null."""
        return self.given.get(self._spelling.get(key, key)) is not None

    def unread(self) -> list[str]:
        """List the keys of the file that have a value and that nothing has looked up."""
        return [key for key, value in self.given.items() if value is not None and key not in self._read]

    def _get(self, key: str, default: Any, right: str) -> Any:
        value = self.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            self.refuse(key, f"it must be {right}")
        return default

    def integer(self, key: str, default: int = _REQUIRED, *, low: int = 1, high: int = MAX_SIZE) -> int:
        right = f"an integer from {low} to {high}"
        value = self._get(key, default, right)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            self.refuse(key, f"it must be {right}")
        return value

    def number(self, key: str, default: float = _REQUIRED, *, low: float = LEAST) -> float:
        right = f"a number from {low:g} to {MOST:g}"
        value = self._get(key, default, right)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= MOST:
            self.refuse(key, f"it must be {right}")
        return float(value)

    def flag(self, key: str, default: bool = _REQUIRED) -> bool:
        value = self._get(key, default, "true or false")
        if not isinstance(value, bool):
            self.refuse(key, "it must be true or false")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: str = _REQUIRED) -> str:
        right = f"supported here: {', '.join(allowed)}"
        value = self._get(key, default, right)
        if value not in allowed:
            self.refuse(key, right)
        return str(value)

    def integers(self, key: str) -> list[int]:
        """Return a list of integers; empty if the key is missing or null."""
        value = self._get(key, [], "")
        if not isinstance(value, list) or any(type(i) is not int for i in value):
            self.refuse(key, "it must be a list of integers")
        return value

    def words(self, key: str, allowed: tuple[str, ...]) -> list[str]:
        """Return a list of words, each one of `allowed`; empty if the key is missing or null."""
        value = self._get(key, [], "")
        if not isinstance(value, list) or any(word not in allowed for word in value):
            self.refuse(key, f"it must be a list, and supported in it are: {', '.join(allowed)}")
        return value

    def must_be(self, key: str, value: Any, why: str) -> None:
        """Refuse `key` if the file gives it another value than `value` (null excepted)."""
        if self.has(key) and (self.get(key) != value or isinstance(self.get(key), bool) != isinstance(value, bool)):
            self.refuse(key, f"{why}; it must be {shown(value)}")

    def section(self, key: str) -> ConfigReader | None:
        if not self.has(key):
            return None
        value = self.get(key)
        if not isinstance(value, dict):
            self.refuse(key, "it must be an object")
        if key not in self.sections:
            self.sections[key] = ConfigReader(value, self.source, f"{self._place(key)}{key}.")
        return self.sections[key]

    def token_ids(self, key: str) -> list[int]:
        """Return the token ids of `key`, which may hold one id, a list of ids, or null."""
        value = self.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            self.refuse(key, "it must be a token id, or a list of them")
        return ids


def shown(value: Any) -> str:
    """Return `value` as JSON, cut at MAX_SHOWN characters."""
    try:
        text = json.dumps(value, default=str)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def read_json(path: Path) -> ConfigReader:
    """Read a JSON object from `path`. Raises CheckpointError if the file is missing or holds anything else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a checkpoint folder must hold one", param="model") from None
    except RecursionError:
        raise CheckpointError(f"{path}: cannot be read as JSON: it is nested too deeply", param="model") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}", param="model") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: it must hold a JSON object, not {type(data).__name__}", param="model")
    return ConfigReader(data, str(path))
