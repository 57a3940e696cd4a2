"""Detokenizers: they turn token ids into text while the ids arrive.

A detokenizer returns text in pieces. The pieces joined are the text of all tokens, and no piece ends inside a character.
The tokenizer's decoder decides which of two classes is used:

    ByteDetokenizer     byte-level BPE (GPT-2, Llama 3, Qwen, DeepSeek): a token is bytes, and the text is their UTF-8
    WindowDetokenizer   all other tokenizers (SentencePiece, WordPiece): a token's text depends on the token before it

Ids that the tokenizer does not know have no text. Special tokens have none either, unless the request asks to see them.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    def add(self, tokens: Sequence[int]) -> str:
        """Return the text that is certain after `tokens`. Bytes of an incomplete character are held back."""

    def chars_before(self, token: int) -> int:
        """Return how many U+FFFD the held bytes become if `token` comes next, since it does not continue their character."""

    def flush(self) -> str:
        """Return the text that was held back. The caller calls this once, after the last token."""


class ByteDetokenizer:
    """The detokenizer of one output of a byte-level BPE. It holds back at most the 3 bytes of an incomplete character."""

    __slots__ = ("_bytes", "_decode", "_decoder")

    def __init__(self, token_bytes: Mapping[int, bytes]) -> None:
        self._bytes = token_bytes
        self._decoder = _new_utf8_decoder("replace")
        self._decode = self._decoder.decode

    def add(self, tokens: Sequence[int]) -> str:
        token_bytes = self._bytes
        if len(tokens) == 1:
            return self._decode(token_bytes[tokens[0]])
        return self._decode(b"".join([token_bytes[token] for token in tokens]))

    def chars_before(self, token: int) -> int:
        held, added = self._decoder.getstate()[0], self._bytes[token]
        continues = not (held and added) or _may_become_text(held + added[:1])
        return 0 if continues else len(held.decode("utf-8", "replace"))

    def flush(self) -> str:
        return self._decode(b"", True)


class TokenTexts(Protocol):
    """The methods of a tokenizer that WindowDetokenizer uses."""

    @property
    def decode_tokens(self) -> Callable[[Sequence[int]], str]:
        """The library's function that decodes a list of tokens to text. The list must have no silent token."""

    @property
    def is_silent(self) -> Mapping[int, bool]:
        """True for tokens without text: ids that the tokenizer does not know, and special tokens that are hidden."""

    @property
    def byte_of(self) -> Mapping[int, int | None]:
        """The byte of a byte-fallback token ("<0x0A>" is 10), and None for every other token."""

    @property
    def anchor(self) -> tuple[int, ...]:
        """One ordinary token with text, or nothing if the vocabulary has none."""


class WindowDetokenizer:
    """Turns the tokens of one output into text, for tokenizers whose token texts depend on the previous token.

    The text of new tokens is what they add to a short context: decode(context + new) without decode(context). The context
    is the last unit that was written. A unit is one ordinary token, or the byte tokens of one complete character.

    Byte tokens are held back, at most 3 of them, until they complete a character. A byte token that cannot be part of a
    character becomes U+FFFD. The library instead replaces every byte of a run that has one wrong byte, and for that it must
    see the end of the run, which may be the end of the stream. A prompt may end inside a character. The output may complete
    the character. If it does not, the prompt's bytes add nothing to the output.
    """

    __slots__ = ("_begun", "_context", "_context_len", "_held", "_num_prompt_held", "_texts")

    def __init__(self, texts: TokenTexts, prompt_end: Sequence[int] = ()) -> None:
        """`prompt_end` is the last tokens of the prompt. They are the context of the first output token, because a SentencePiece
        decoder drops the space before a text's first word."""
        self._texts = texts
        self._context: list[int] = []
        self._context_len = 0  # length of decode(context), in characters
        self._held: list[int] = []  # byte tokens of an incomplete character
        self._num_prompt_held = 0  # of the held tokens, the first ones, which are the prompt's
        self._begun = False  # whether any text was written
        self.add(prompt_end)
        self._num_prompt_held = len(self._held)

    def add(self, tokens: Sequence[int]) -> str:
        is_silent, byte_of = self._texts.is_silent, self._texts.byte_of
        parts: list[str] = []
        run: list[int] = []  # units that the library can decode together
        unit: list[int] = []  # the last unit of the run
        for token in tokens:
            if is_silent[token]:
                continue
            if byte_of[token] is None:
                if self._held:
                    parts += [self._write(run, unit), self.flush()]
                    run = []
                unit = [token]
                run.append(token)
                continue
            self._held.append(token)
            while self._held:
                num_bytes, is_character = self._first_unit()
                if not num_bytes:
                    break
                if is_character:
                    unit = self._held[:num_bytes]
                    run += unit
                    self._release(num_bytes)
                else:
                    parts += [self._write(run, unit), self._write_undecodable(num_bytes)]
                    run = []
        parts.append(self._write(run, unit))
        return "".join(parts)

    def chars_before(self, token: int) -> int:
        byte_of = self._texts.byte_of
        if not self._held or self._texts.is_silent[token]:
            return 0
        if byte_of[token] is not None and _may_become_text(self._bytes_of([*self._held, token])):
            return 0
        return len(self._held) - self._num_prompt_held

    def flush(self) -> str:
        return self._write_undecodable(len(self._held))

    def _first_unit(self) -> tuple[int, bool]:
        """Return how many of the first held byte tokens are one character, or are bytes that cannot be decoded.

        The second value is True for a character. (0, False) means that the bytes may still become a character.
        """
        try:
            _, num_bytes = codecs.utf_8_decode(self._bytes_of(self._held), "strict", False)
        except UnicodeDecodeError as error:
            return error.end - error.start, False
        return num_bytes, True

    def _bytes_of(self, tokens: Sequence[int]) -> bytes:
        byte_of = self._texts.byte_of
        return bytes([byte for token in tokens if (byte := byte_of[token]) is not None])

    def _write(self, run: list[int], unit: list[int]) -> str:
        """Return the text that `run` adds, and make its last unit the context of what follows."""
        if not run:
            return ""
        decode = self._texts.decode_tokens
        text = decode([*self._context, *run])[self._context_len :]
        self._begun = self._begun or bool(text)
        unit_len = len(decode(unit))
        if unit_len:
            self._context, self._context_len = list(unit), unit_len
        else:  # the decoder drops this space at a text's start; once text was written, the context must not look like a start
            self._context = [*(self._texts.anchor if self._begun else self._context), *unit]
            self._context_len = len(decode(self._context))
        return text

    def _write_undecodable(self, num_tokens: int) -> str:
        """Release the first `num_tokens` held tokens, and return U+FFFD for each of them that is not the prompt's.

        An ordinary token becomes the context: undecodable bytes in the context would change the text that follows.
        """
        if num_tokens:
            self._begun = True
            self._context = list(self._texts.anchor)
            self._context_len = len(self._texts.decode_tokens(self._context)) if self._context else 0
        return REPLACEMENT * self._release(num_tokens)

    def _release(self, num_tokens: int) -> int:
        """Remove the first `num_tokens` held tokens, and return how many of them are not the prompt's."""
        self._held = self._held[num_tokens:]
        num_prompt = min(num_tokens, self._num_prompt_held)
        self._num_prompt_held -= num_prompt
        return num_tokens - num_prompt


def _may_become_text(held: bytes) -> bool:
    """Return whether `held` is UTF-8 as far as it goes. The bytes of a last character may be incomplete."""
    try:
        codecs.utf_8_decode(held, "strict", False)
    except UnicodeDecodeError:
        return False
    return True
