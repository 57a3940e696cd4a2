"""Tokens to text as they come: the pieces joined are the text of all the tokens, and no piece ends inside a character.

Two kinds, chosen by the tokenizer's decoder:

    ByteDetokenizer     byte-level BPE (GPT-2, Llama 3, Qwen, DeepSeek): a token is bytes, text is their UTF-8
    WindowDetokenizer   everything else (SentencePiece, WordPiece): a token's text depends on its neighbours

Special tokens have no text, and neither have ids that the tokenizer does not know.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    def add(self, tokens: Sequence[int]) -> str:
        """The text that has become certain; it may lag behind the tokens."""

    def flush(self) -> str:
        """The rest, when there are no more tokens."""


class ByteDetokenizer:
    __slots__ = ("_bytes", "_decode")

    def __init__(self, token_bytes: Mapping[int, bytes]) -> None:
        self._bytes = token_bytes
        self._decode = _new_utf8_decoder("replace").decode

    def add(self, tokens: Sequence[int]) -> str:
        token_bytes = self._bytes
        if len(tokens) == 1:
            return self._decode(token_bytes[tokens[0]])
        return self._decode(b"".join([token_bytes[token] for token in tokens]))

    def flush(self) -> str:
        return self._decode(b"", True)


class WindowDetokenizer:
    """Decodes the new tokens behind the ones of the piece before, and takes what that adds.

        context or piece before | held back ...... | new
        ^ self._before          ^ self._new

    Text is held back while it ends in U+FFFD, and while the last token is one of a byte fallback ("<0x0A>"): a decoder with
    byte fallback looks at a whole run of those at once, and one wrong byte makes U+FFFD of every byte in the run.
    """

    __slots__ = ("_before", "_before_len", "_decode", "_is_byte", "_is_silent", "_new")

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        *,
        is_silent: Mapping[int, bool],
        is_byte: Mapping[int, bool],
        context: Sequence[int] = (),
    ) -> None:
        """`is_silent` tokens are those without text. `context` are tokens that stand before the text, the prompt's last
        few: a SentencePiece decoder drops the space before the very first word."""
        self._decode = decode
        self._is_silent = is_silent
        self._is_byte = is_byte
        self._before = [token for token in context if not is_silent[token]]
        self._before_len = len(decode(self._before)) if self._before else 0
        self._new: list[int] = []

    def add(self, tokens: Sequence[int]) -> str:
        new, is_silent = self._new, self._is_silent
        new += [token for token in tokens if not is_silent[token]]
        if not new or self._is_byte[new[-1]]:
            return ""
        text = self._decode(self._before + new)[self._before_len :]
        if text.endswith(_UNFINISHED):
            return ""
        self._before, self._new = new, []
        self._before_len = len(self._decode(new))
        return text

    def flush(self) -> str:
        if not self._new:
            return ""
        return self._decode(self._before + self._new)[self._before_len :]
