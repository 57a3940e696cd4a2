"""A model folder's tokenizer: text to token ids and back. No torch, no transformers.

Holds no state of any request: `detokenizer()` makes what follows one output.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from engine.errors import CheckpointError
from server.text.chat import ChatTemplate
from server.text.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer

_CONTEXT_TOKENS = 8  # of the prompt, for decoders that look at neighbours
_TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
T = TypeVar("T")


class Tokenizer:
    """`add_bos` and `bos_token` are for models whose tokenizer.json leaves the first token to its caller."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        chat: ChatTemplate | None = None,
        add_bos: bool | None = None,
        bos_token: str | None = None,
    ) -> None:
        tokenizer.no_truncation()  # some files carry settings of their training
        tokenizer.no_padding()
        self.chat = chat
        self._tokenizer = tokenizer
        self._add_bos = add_bos
        self._bos = None if bos_token is None else tokenizer.token_to_id(bos_token)
        self._special = frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        decoder = json.loads(tokenizer.to_str())["decoder"] or {}
        kinds = [part["type"] for part in decoder.get("decoders", [decoder] if decoder else [])]
        self._is_byte_level = kinds == ["ByteLevel"]
        self._token_bytes = _Memo(self._make_bytes)
        self._is_silent = _Memo(lambda id: id in self._special or tokenizer.id_to_token(id) is None)
        self._is_byte = _Memo(lambda id: _fallback_byte(tokenizer.id_to_token(id) or "") is not None)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Raises CheckpointError, naming the file that is missing or cannot be read."""
        # A server encodes one prompt a call. Threads of the library's own would only compete with the engine's.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: a model folder must have a tokenizer.json")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        config = _read_config(Path(folder) / "tokenizer_config.json")
        named = {name: text for name in _TEMPLATE_TOKENS if (text := _token_text(config.get(name))) is not None}
        return cls(
            tokenizer,
            chat=_chat_template(Path(folder), config, named),
            add_bos=config.get("add_bos_token"),
            bos_token=named.get("bos_token"),
        )

    @property
    def vocab_size(self) -> int:
        """Ids known here; a model may have more, which then have no text."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """`text` must have no lone surrogates. May run in a thread: other threads go on meanwhile."""
        # Of the library's ways to encode, those for batches let go of the interpreter lock; `encode` does not.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        if not add_special_tokens or self._bos is None or self._add_bos is None:
            return ids
        if self._add_bos and ids[:1] != [self._bos]:
            return [self._bos, *ids]
        if not self._add_bos and ids[:1] == [self._bos] and not self._encodes_to_bos(text):
            return ids[1:]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Their text, special tokens left out."""
        if self._is_byte_level:
            return b"".join([self._token_bytes[id] for id in ids]).decode("utf-8", "replace")
        return str(self._tokenizer.decode([id for id in ids if not self._is_silent[id]], skip_special_tokens=True))

    def detokenizer(self, prompt: Sequence[int] = ()) -> Detokenizer:
        """For one output that continues `prompt`."""
        if self._is_byte_level:
            return ByteDetokenizer(self._token_bytes)
        context = list(prompt[-_CONTEXT_TOKENS:])
        while context and self._is_byte[context[0]]:  # the run it belongs to may begin before the window
            del context[0]
        return WindowDetokenizer(self.decode, is_silent=self._is_silent, is_byte=self._is_byte, context=context)

    def token_text(self, id: int) -> str:
        """One token by itself, special ones included; bytes that are no whole character show as U+FFFD."""
        return self.token_bytes(id).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """What one token adds to the text, special ones included."""
        content = self._tokenizer.id_to_token(id)
        if content is None:
            return b""
        if id in self._special:
            return content.encode()
        if self._is_byte_level:
            return self._token_bytes[id]
        byte = _fallback_byte(content)
        return content.replace("▁", " ").encode() if byte is None else bytes([byte])

    def _encodes_to_bos(self, text: str) -> bool:
        """Whether the text itself begins with the token."""
        return bool(self._tokenizer.encode(text[:64], add_special_tokens=False).ids[:1] == [self._bos])

    def _make_bytes(self, id: int) -> bytes:
        content = self._tokenizer.id_to_token(id)
        if content is None or id in self._special:
            return b""
        try:
            return bytes([_BYTE_OF[character] for character in content])
        except KeyError:  # an added token is written as it is
            return content.encode()


class _Memo(dict[int, T]):
    """A table that fills itself: a vocabulary has some 100,000 entries, of which a worker meets a few thousand soon."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[[int], T]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, id: int) -> T:
        value = self[id] = self._make(id)
        return value


def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet: bytes that print stand for themselves, the others for the characters from U+0100 on, in order."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printing)]
    return {chr(byte): byte for byte in printing} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_of()


def _fallback_byte(content: str) -> int | None:
    """65 for "<0x41>"."""
    if len(content) != 6 or not (content.startswith("<0x") and content.endswith(">")):
        return None
    try:
        return int(content[3:5], 16)
    except ValueError:
        return None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold one object")
    return config


def _token_text(value: Any) -> str | None:
    """Written as a string, or as an object with its `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _chat_template(folder: Path, config: dict[str, Any], named: dict[str, str]) -> ChatTemplate | None:
    """From chat_template.jinja, which is the newer place, or the config's `chat_template`: a string, or a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return ChatTemplate(path.read_text(encoding="utf-8"), named, origin=str(path))
    source = config.get("chat_template")
    if isinstance(source, list):
        named_so = (entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default")
        source = next(named_so, {}).get("template")
    if source is None:
        return None
    if not isinstance(source, str):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: chat_template must be a string")
    return ChatTemplate(source, named, origin=str(folder / "tokenizer_config.json"))
