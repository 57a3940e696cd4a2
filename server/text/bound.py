"""A lower bound on the number of tokens of a text, in microseconds to milliseconds and without tokenising it.

The bound is proven: it never exceeds the true number of tokens, so a text that fits is never refused.
For a tokenizer in which some part may shrink a text without limit (say, one that drops white space) there is no bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from server.text.cuts import Cuts, has_all_bytes, parts_of
from server.text.token_bytes import BYTE_OF, byte_level_bytes

_WINDOW = 1 << 16  # characters searched before the count is compared with the limit
# NFC and NFKC can shrink UTF-8 by 8 at most: a character of the result comes from at most 4 characters (the longest canonical
# decomposition), each of them of 4 bytes at most. It has 2 bytes or more if it comes from several characters.
_COMPOSED_SHRINK = 8


@dataclass(frozen=True)
class TokenBound:
    """`longest` is the number of bytes of the longest token. `strips` are the added tokens that absorb the white space around
    them, however long it is: a text with one of these tokens has no bound."""

    longest: int
    composes: bool  # the normalizer is NFC or NFKC, which changes texts that are not ASCII
    before_spaces: bool  # a space after other text always begins a token
    strips: tuple[str, ...]

    def exceeds(self, text: str, limit: int) -> bool:
        """Whether `text` certainly has more than `limit` tokens."""
        if len(text) <= limit or any(content in text for content in self.strips):
            return False  # not certain
        longest = self.longest * (_COMPOSED_SHRINK if self.composes and not text.isascii() else 1)
        if len(text) > limit * longest or (not text.isascii() and len(text.encode()) > limit * longest):
            return True
        return self.before_spaces and _num_words_exceeds(text, limit)


def _num_words_exceeds(text: str, limit: int) -> bool:
    """Whether more than `limit` places are a space after a printing ASCII character. Each such space begins a token."""
    num = 0
    for start in range(0, len(text), _WINDOW):
        window = np.frombuffer(text[start : start + _WINDOW + 1].encode(), np.uint8)
        before = window[:-1]
        num += int(np.count_nonzero((window[1:] == 0x20) & (before > 0x20) & (before < 0x7F)))
        if num > limit:
            return True
    return False


def find_bound(spec: dict[str, Any], cuts: Cuts | None) -> TokenBound | None:
    """The bound of the tokenizer that `spec` (a parsed tokenizer.json) describes, or None if there is none."""
    model, added = spec["model"], spec.get("added_tokens") or []
    normalizers = [part["type"] for part in parts_of(spec["normalizer"], "normalizers") if not _only_grows(part)]
    if model["type"] != "BPE" or any(name not in ("NFC", "NFKC") for name in normalizers):
        return None
    pre_tokenizers = parts_of(spec["pre_tokenizer"], "pretokenizers")
    if not all(_keeps_text(part, cuts) for part in pre_tokenizers):
        return None
    is_byte_level = any(part["type"] == "ByteLevel" for part in pre_tokenizers)
    if not (has_all_bytes(model) or (is_byte_level and BYTE_OF.keys() <= model["vocab"].keys())):
        return None
    strips = [token for token in added if token["lstrip"] or token["rstrip"]]
    if any(token["normalized"] for token in strips) and spec["normalizer"] is not None:
        return None
    lengths = [len(byte_level_bytes(token) if is_byte_level else token.encode()) for token in model["vocab"]]
    return TokenBound(
        longest=max([*lengths, *(len(token["content"].encode()) for token in added)]),
        composes=bool(normalizers),
        before_spaces=cuts is not None and cuts.before_spaces,
        strips=tuple(token["content"] for token in strips),
    )


def _only_grows(part: dict[str, Any]) -> bool:
    """Whether a normalizer never makes a text shorter, in bytes."""
    if part["type"] == "Prepend":
        return True
    pattern = part["pattern"].get("String") if part["type"] == "Replace" else None
    return pattern is not None and len(pattern.encode()) <= len(part["content"].encode())


def _keeps_text(part: dict[str, Any], cuts: Cuts | None) -> bool:
    """Whether a pre-tokenizer keeps every character of a text."""
    if part["type"] in ("ByteLevel", "Digits", "Metaspace"):
        return True
    if part["type"] == "Split":  # Removed with invert keeps the matches only; matches of a known word pattern are the whole text
        return part["behavior"] != "Removed" or (part["invert"] and cuts is not None)
    return False
