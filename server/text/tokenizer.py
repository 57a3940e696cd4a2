"""Tokenizer: text to token ids and back, with the tokenizer.json of a model folder. It needs neither torch nor transformers.

A Tokenizer holds no state of a request. `detokenizer` creates the object that turns the tokens of one output into text.
`encoding` and `decoding` create jobs, which do long work in steps of some milliseconds.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from engine.errors import CheckpointError
from server.text.bound import find_bound
from server.text.chat_templates import ChatTemplates
from server.text.cuts import find_cuts, parts_of, pieces_of
from server.text.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from server.text.end_tokens import find_end_tokens
from server.text.jobs import DecodeJob, EncodeJob, OffsetsJob, finish
from server.text.model_files import named_tokens, read_config
from server.text.token_bytes import byte_level_bytes, fallback_byte

PIECE_CHARS = 1 << 14  # characters that one step tokenises: some 5 ms, some 3 MB
PIECE_TOKENS = 1 << 10  # tokens that one step decodes: some 2 ms
_CONTEXT_TOKENS = 8  # last tokens of the prompt given to a detokenizer: enough for two characters of byte tokens
_LIST_IDS = 1 << 16  # ids that are copied to a list at once; other Python threads can run between two copies
_JOINERS = frozenset({"WordPiece", "BPEDecoder", "CTC"})
_LOCAL_DECODERS = frozenset({"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "WordPiece"})
T = TypeVar("T")


class Tokenizer:
    """The tokenizer of one model. `add_bos` and `bos_token` come from tokenizer_config.json.

    `add_bos` True puts the begin token before a text that does not have it, False leaves it out, and None follows tokenizer.json.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        chat: ChatTemplates | None = None,
        add_bos: bool | None = None,
        bos_token: str | None = None,
        end_tokens: Mapping[int, str] | None = None,
    ) -> None:
        self.chat = chat or ChatTemplates({})
        tokenizer.no_truncation()  # some tokenizer.json files still have the truncation and padding of training
        tokenizer.no_padding()
        self.end_tokens = dict(end_tokens or {})  # ids of the tokens that end a turn, each with the files that say so
        self._tokenizer = tokenizer
        self._add_bos = add_bos
        self._bos = None if bos_token is None else tokenizer.token_to_id(bos_token)
        self._special = frozenset(id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        spec = json.loads(tokenizer.to_str())
        self._cuts = find_cuts(spec)
        self._bound = find_bound(spec, self._cuts)
        decoders = parts_of(spec["decoder"], "decoders")
        self._decodes_in_pieces = _is_local(decoders)
        kinds = [part["type"] for part in decoders]
        self._is_byte_level = kinds == ["ByteLevel"]
        self._has_byte_tokens = "ByteFallback" in kinds
        self.joins_with_spaces = not kinds or not _JOINERS.isdisjoint(kinds)  # the decoder writes spaces between tokens
        self._token_bytes = _Memo(self._make_bytes)  # a special token has no bytes
        self._shown_bytes = _Memo(self._make_shown_bytes)
        self.is_silent = _Memo(lambda id: id in self._special or not tokenizer.id_to_token(id))
        self.byte_of = _Memo(self._find_byte)
        self._before, self._after = self._special_tokens()
        self._anchor: tuple[int, ...] | None = None
        self._shown = _ShownTexts(self, tokenizer)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer of a model folder. Raises CheckpointError, naming the file that is missing or cannot be read."""
        # A server encodes one piece of text in each call. The library's own threads would only compete with the engine's.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: a model folder must have a tokenizer.json")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        config = read_config(Path(folder) / "tokenizer_config.json")
        named = named_tokens(Path(folder), config, padding=(tokenizer.padding or {}).get("pad_token"))
        chat = ChatTemplates.from_folder(Path(folder), config, named)
        return cls(
            tokenizer,
            chat=chat,
            add_bos=config.get("add_bos_token"),
            bos_token=named.get("bos_token"),
            end_tokens=find_end_tokens(Path(folder), tokenizer, chat.default),
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids that the tokenizer knows. A model may have more ids, which then have no text."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokenise `text`, which must have no lone surrogates, and return its token ids."""
        return finish(self.encoding(text, add_special_tokens=add_special_tokens))

    def encoding(self, text: str, *, add_special_tokens: bool = True) -> EncodeJob:
        """Return a job that does the work of `encode` in steps of PIECE_CHARS characters.

        The job has one step if the text cannot be cut.
        """
        before, after = (self._before, self._after) if add_special_tokens else ([], [])
        bos = self._bos if add_special_tokens and self._add_bos else None
        pieces = pieces_of(text, self._cuts, PIECE_CHARS)
        return EncodeJob(pieces, self._encode_piece, partial(_framed, before, after, bos))

    def exceeds(self, text: str, limit: int) -> bool:
        """Return True if `text` certainly has more than `limit` tokens, after a few milliseconds at most. False: not certain."""
        return self._bound is not None and self._bound.exceeds(text, limit)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Decode token ids to text. Special tokens are left out, unless `skip_special_tokens` is False."""
        return finish(self.decoding(ids, skip_special_tokens=skip_special_tokens))

    def decoding(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> DecodeJob:
        """Return a job that does the work of `decode` in steps of PIECE_TOKENS tokens.

        The job has one step if the tokenizer's decoder needs all tokens at once.
        """
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return DecodeJob(ids, detokenizer, PIECE_TOKENS if self._decodes_in_pieces else len(ids))

    def text_and_offsets(self, ids: Sequence[int], *, skip_special_tokens: bool) -> OffsetsJob:
        """Return a job that decodes `ids`, and finds where in the text the text of each token begins."""
        return OffsetsJob(ids, self.detokenizer(skip_special_tokens=skip_special_tokens), PIECE_TOKENS)

    def offsets_in(self, text: str) -> list[int]:
        """Find where in `text` the text of each of its tokens begins, without the special tokens around a text.

        The library's own offsets are used. They leave out the white space before a token, which belongs to the token.
        """
        offsets: list[int] = []
        end = 0
        for start, stop in self._tokenizer.encode_batch([text], add_special_tokens=False)[0].offsets:
            offsets.append(end if end < start and text[end:start].isspace() else start)
            end = max(end, stop)
        return offsets

    def num_around(self, text: str) -> tuple[int, int]:
        """Return how many special tokens `encode` puts before and after `text`."""
        bos, before, after = self._bos, len(self._before), len(self._after)
        if not self._add_bos or bos is None:
            return before, after
        is_there = self._before[0] == bos if before else text.startswith(self.token_text(bos))
        return before + (not is_there), after

    def decode_tokens(self, ids: Sequence[int]) -> str:
        """Decode token ids, none of which is special, with the library's decoder. Other threads run meanwhile."""
        return str(self._tokenizer.decode_batch([ids], skip_special_tokens=True)[0])

    def detokenizer(self, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        """Return a detokenizer for one output that continues `prompt`. Special tokens have no text if they are skipped."""
        if self._is_byte_level:
            return ByteDetokenizer(self._token_bytes if skip_special_tokens else self._shown_bytes)
        return WindowDetokenizer(self if skip_special_tokens else self._shown, prompt[-_CONTEXT_TOKENS:])

    def special_text(self, id: int) -> str:
        """Return the text of a special token, and "" for every other token."""
        return self.token_text(id) if id in self._special else ""

    @property
    def anchor(self) -> tuple[int, ...]:
        """The id of an ordinary token whose text is not only white space, in a tuple; () if the vocabulary has no such token."""
        if self._anchor is None:
            usable = (id for id in range(self.vocab_size) if not self.is_silent[id] and self.byte_of[id] is None)
            self._anchor = next(((id,) for id in usable if self.decode_tokens([id]).strip()), ())
        return self._anchor

    def token_text(self, id: int) -> str:
        """Return the text of one token, which may be special, by itself. Bytes of an incomplete character become U+FFFD."""
        return self.token_bytes(id).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes that one token, which may be special, adds to a text."""
        content = self._tokenizer.id_to_token(id)
        if content is None:
            return b""
        if id in self._special:
            return str(content).encode()
        if self._is_byte_level:
            return self._token_bytes[id]
        byte = self.byte_of[id]
        return content.replace("▁", " ").encode() if byte is None else bytes([byte])

    def _encode_piece(self, piece: str) -> array[int]:
        """Tokenise a piece of a text, without the special tokens around a text. Other threads run meanwhile."""
        # The library's batch methods release Python's interpreter lock; its `encode` does not.
        return array("i", self._tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0].ids)

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Return the special tokens that the tokenizer puts before and after every text."""
        sample = self._tokenizer.encode("a")
        mask = sample.special_tokens_mask  # 1 for these tokens, 0 for those of the sample
        if 0 not in mask:
            raise CheckpointError("the tokenizer has no token for the letter 'a'")
        before, after = sample.ids[: mask.index(0)], sample.ids[len(mask) - mask[::-1].index(0) :]
        if self._add_bos is False and before[:1] == [self._bos]:
            before = before[1:]
        return before, after

    def _make_bytes(self, id: int) -> bytes:
        content = self._tokenizer.id_to_token(id)
        return b"" if content is None or id in self._special else byte_level_bytes(content)

    def _make_shown_bytes(self, id: int) -> bytes:
        return byte_level_bytes(self._tokenizer.id_to_token(id) or "")

    def _find_byte(self, id: int) -> int | None:
        return fallback_byte(self._tokenizer.id_to_token(id) or "") if self._has_byte_tokens else None


class _ShownTexts:
    """The texts of all tokens, special ones included. Implements `detokenizer.TokenTexts`."""

    def __init__(self, text: Tokenizer, tokenizer: tokenizers.Tokenizer) -> None:
        self._text = text
        self._tokenizer = tokenizer
        self.is_silent: Mapping[int, bool] = _Memo(lambda id: not tokenizer.id_to_token(id))
        self.byte_of: Mapping[int, int | None] = text.byte_of

    def decode_tokens(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode_batch([ids], skip_special_tokens=False)[0])

    @property
    def anchor(self) -> tuple[int, ...]:
        return self._text.anchor


def _framed(before: list[int], after: list[int], bos: int | None, ids: array[int]) -> list[int]:
    """Put `ids` between the special tokens `before` and `after`. If the result does not begin with `bos`, put `bos` first."""
    framed = list(before)
    if bos is not None and (before or ids[:1].tolist())[:1] != [bos]:
        framed.insert(0, bos)
    for start in range(0, len(ids), _LIST_IDS):
        framed += ids[start : start + _LIST_IDS]
    framed += after
    return framed


class _Memo(dict[int, T]):
    """A table by token id that computes each entry at its first use: a worker uses a few thousand of some 100,000 tokens."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[[int], T]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, id: int) -> T:
        value = self[id] = self._make(id)
        return value


def _is_local(decoders: list[dict[str, Any]]) -> bool:
    """Return whether token ids can be decoded in pieces: a piece's text depends only on the piece and the token before it."""
    fused = False
    for part in decoders:
        kind = part["type"]
        if kind == "Replace":
            known = len(part["pattern"].get("String", "")) == 1
        elif kind == "Strip":
            known = part["stop"] == 0 and (part["start"] <= 1 or not fused)
        else:
            known = kind in _LOCAL_DECODERS and not (fused and kind in ("Metaspace", "WordPiece", "ByteFallback"))
        if not known:
            return False
        fused = fused or kind == "Fuse"
    return True
