"""Computes a lower bound on the number of tokens of a text in microseconds to milliseconds, without tokenising the text.

The bound is proven: it never exceeds the true number of tokens, so a text that fits into the context is never refused.
For a tokenizer in which some part may shrink a text without limit (say, one that drops white space) there is no bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from server.text.cuts import META, Cuts, has_all_bytes, parts_of
from server.text.token_bytes import BYTE_OF, byte_level_bytes

_WINDOW = 1 << 16  # number of characters after which the tokens counted so far are compared with the limit
# NFC and NFKC can shrink UTF-8 by 8 at most: a character of the result comes from at most 4 characters (the longest canonical
# decomposition), each of them of 4 bytes at most. It has 2 bytes or more if it comes from several characters.
_COMPOSED_SHRINK = 8
_SPACE_TO_META = ({"String": " "}, META)


@dataclass(frozen=True)
class TokenBound:
    """Bounds the number of tokens of texts for one tokenizer. `longest` is the number of bytes of the longest token.

    `strips` are the added tokens that absorb the white space around them, however long it is. A text with one of these tokens
    has no bound.
    """

    longest: int
    shares: np.ndarray[Any, np.dtype[np.float64]]  # [256]: for each byte, 1 / length of the longest token that contains it
    composes: bool  # the normalizer is NFC or NFKC, which changes texts that are not ASCII
    before_spaces: bool  # a space after other text always begins a token
    strips: tuple[str, ...]

    def exceeds(self, text: str, limit: int) -> bool:
        """Return True if `text` certainly has more than `limit` tokens. False means that this is not certain."""
        if len(text) <= limit or any(content in text for content in self.strips):
            return False  # `text` may have `limit` tokens or fewer
        is_composed = self.composes and not text.isascii()
        longest = self.longest * (_COMPOSED_SHRINK if is_composed else 1)
        if len(text) > limit * longest:
            return True
        num_words, num_shares = 0, 0.0
        for start in range(0, len(text), _WINDOW):
            data = np.frombuffer(text[start : start + _WINDOW].encode(), np.uint8)
            num_words += _num_words(data) if self.before_spaces else 0
            num_shares += 0.0 if is_composed else float(np.bincount(data, minlength=256) @ self.shares)
            if num_words > limit or num_shares > limit + 1:  # the margin of one token covers rounding errors
                return True
        return False


def _num_words(data: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    """Count the spaces that follow a printing ASCII character. Each of these spaces begins a token."""
    before = data[:-1]
    return int(np.count_nonzero((data[1:] == 0x20) & (before > 0x20) & (before < 0x7F)))


def _shares(sources: list[bytes]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return each byte's share: 1 / length of the longest token that contains the byte.

    The shares of a token's bytes add up to at most 1. So the shares of a text's bytes add up to at most its number of tokens.
    """
    longest = np.ones(256)
    for source in sources:
        for byte in set(source):
            longest[byte] = max(longest[byte], len(source))
    return 1 / longest


def find_bound(spec: dict[str, Any], cuts: Cuts | None) -> TokenBound | None:
    """Return the bound of the tokenizer that `spec` (a parsed tokenizer.json) describes, or None if it has no bound."""
    model, added = spec["model"], spec.get("added_tokens") or []
    normalizers = [part["type"] for part in parts_of(spec["normalizer"], "normalizers") if not _only_grows(part)]
    if model["type"] != "BPE" or any(name not in ("NFC", "NFKC") for name in normalizers):
        return None
    pre_tokenizers = parts_of(spec["pre_tokenizer"], "pretokenizers")
    if not all(_keeps_text(part, cuts) for part in pre_tokenizers):
        return None
    is_byte_level = any(part["type"] == "ByteLevel" for part in pre_tokenizers)
    if is_byte_level and len(normalizers) != len(parts_of(spec["normalizer"], "normalizers")):
        return None  # META, in place of a space, would be three bytes that the text does not have
    if not (has_all_bytes(model) or (is_byte_level and BYTE_OF.keys() <= model["vocab"].keys())):
        return None
    strips = [token for token in added if token["lstrip"] or token["rstrip"]]
    if any(token["normalized"] for token in strips) and spec["normalizer"] is not None:
        return None
    # META is three bytes in a token. It may stand for a space of the text, which counts as one of these bytes.
    sources = [byte_level_bytes(token) if is_byte_level else token.encode() for token in model["vocab"]]
    sources += [token["content"].encode() for token in added]
    sources += [source.replace(META.encode(), b"   ") for source in sources if not is_byte_level]
    return TokenBound(
        longest=max(map(len, sources)),
        shares=_shares(sources),
        composes=bool(normalizers),
        before_spaces=cuts is not None and cuts.before_spaces,
        strips=tuple(token["content"] for token in strips),
    )


def _only_grows(part: dict[str, Any]) -> bool:
    """Return whether a normalizer keeps every byte of a text, apart from spaces that become META."""
    return part["type"] == "Prepend" or (part["type"] == "Replace" and (part["pattern"], part["content"]) == _SPACE_TO_META)


def _keeps_text(part: dict[str, Any], cuts: Cuts | None) -> bool:
    """Return whether a pre-tokenizer keeps every character of a text."""
    if part["type"] in ("ByteLevel", "Digits"):
        return True
    if part["type"] == "Metaspace":
        return bool(part["replacement"] == META)
    if part["type"] == "Split":  # Removed with invert keeps the matches only; matches of a known word pattern are the whole text
        return part["behavior"] != "Removed" or (part["invert"] and cuts is not None)
    return False
