"""Finds where a long text may be cut so that its pieces, tokenised one by one, give exactly the token ids of the whole text.

A cut is safe if the whole text has a token boundary there, and if neither side looks across it. Two kinds of places are
considered. Both are checked against every part of the tokenizer, and a tokenizer with an unknown part is not cut at all:

    before a space       "tide| gate"     after any character that is not white space
    inside other text    "a|,b"  "潮|。"   after a letter, before one of FOLLOWERS

The tokenizer guarantees the boundary in one of three ways:

    a word pattern       byte-level BPE: no match of the pattern contains the two characters side by side (WORD_PATTERNS)
    Metaspace            every space starts a new word; there is no boundary inside other text
    the vocabulary       SentencePiece BPE without words: no token contains the two characters side by side, so no merge ever
                         joins them, and BPE merges on the two sides cannot influence each other
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

META = "▁"  # stands for a space in SentencePiece vocabularies
# Characters that are letters in every version of Unicode, and that NFC and NFKC do not change unless a mark follows.
LETTERS = "A-Za-zÀ-ÖØ-öø-ÿΑ-ΡΣ-Ωα-ωА-яぁ-ゖァ-ヺ一-龥가-힣"
# Characters that may begin a piece after a letter. The apostrophe is missing: "'s" is part of some
# words. The last seven are CJK punctuation.
FOLLOWERS = '\t\n\r !"#$%&()*+,-./0123456789:;<=>?@[\\]^_`{|}~\uff0c\u3002\u3001\uff01\uff1f\uff1b\uff1a'
_SEARCH_CHARS = 1 << 16  # characters per search; other Python threads can run between two searches

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
# Each of these patterns divides the whole text into matches. No match has a character that is not white space directly before a
# space, or a letter directly before one of FOLLOWERS, and no lookahead reads past white space.
WORD_PATTERNS = frozenset(
    {
        _GPT2,
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _OTHERS,  # Llama 3
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _OTHERS,  # Qwen 2 and 3
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES,  # Qwen 3.5
        f"{_LOWER}{_CONTRACTIONS}?|{_UPPER}{_CONTRACTIONS}?" + r"|\p{N}{1,3}" + _SLASHES,  # GPT-4o
        f"{_LOWER}|{_UPPER}" + r"|\p{N}" + _SLASHES,  # Mistral (Tekken)
        # DeepSeek V3, which first applies two of PART_PATTERNS
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*" + _SPACES,
        # Tidepool
        r"\s*[\r\n]+[ \t]*|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    }
)
PART_PATTERNS = frozenset(
    {r"\p{N}", r"\p{N}{1,3}", "[一-龥぀-ゟ\u30a0-ヿ]+"}
)  # every match of these patterns consists of digits only, or of CJK letters only


@dataclass(frozen=True)
class Cuts:
    """Finds where a text can be cut so that its pieces, tokenised one by one, give the tokens of the whole text.

    One object serves one tokenizer. `begins_piece` matches a character at which a piece may begin.
    """

    begins_piece: re.Pattern[str]
    drops_space: bool  # a piece omits the space at the cut, since the normalizer puts a space before every text
    before_spaces: bool  # a space after other text always begins a token

    def find(self, text: str, start: int) -> int | None:
        """Return the position of the first safe cut of `text` at or after `start`, or None if there is none."""
        for at in range(start, len(text), _SEARCH_CHARS):
            found = self.begins_piece.search(text, at, min(at + _SEARCH_CHARS, len(text)))
            if found is not None:
                return found.start()
        return None


def find_cuts(spec: dict[str, Any]) -> Cuts | None:
    """Return the safe cuts of the tokenizer that `spec` (a parsed tokenizer.json) describes, or None if no cut is proven safe."""
    boundaries = _boundaries(spec)
    added = [token["content"] for token in spec.get("added_tokens") or []]
    if boundaries is None or any(token["single_word"] for token in spec.get("added_tokens") or []):
        return None
    followers, needs_space = boundaries
    followers -= followers_in(added)
    before_spaces = " " in followers and not any(re.search(r"[^\s] ", content.replace(META, " ")) for content in added)
    if not before_spaces:
        followers -= {" "}
    # An added token that absorbs the white space after it must stay in one piece with that white space.
    greedy = {token["content"][-1] for token in spec.get("added_tokens") or [] if token["rstrip"]}
    if any(re.fullmatch(f"[{LETTERS}]", character) for character in greedy):
        return None
    drops_space = any(part["type"] == "Prepend" for part in parts_of(spec["normalizer"], "normalizers"))
    patterns = []
    if before_spaces and drops_space:
        ends, starts = {content[-1] for content in added}, {content[0] for content in added}
        patterns.append(f"(?<={_letters_without(ends)}) (?={_letters_without(starts)})")
    elif before_spaces:
        patterns.append(f"(?<=[^\\s{META}{re.escape(''.join(sorted(greedy)))}]) ")
    others = "".join(sorted(followers - {" "}))
    if others and not needs_space:
        patterns.append(f"(?<=[{LETTERS}])[{re.escape(others)}]")
    return Cuts(re.compile("|".join(patterns)), drops_space, before_spaces) if patterns else None


def parts_of(part: dict[str, Any] | None, list_name: str) -> list[dict[str, Any]]:
    """Return the parts of a tokenizer's "Sequence" in order. A part of another type gives a list of one, None an empty list."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [inner for one in part[list_name] for inner in parts_of(one, list_name)]
    return [part]


def followers_in(strings: Iterable[str]) -> set[str]:
    """Return the characters that stand directly after a letter anywhere in `strings`. META counts as a space."""
    found = re.findall(f"(?<=[{LETTERS}])[^{LETTERS}\\0]", "\0".join(strings))
    return {" " if character == META else character for character in found}


def _letters_without(characters: set[str]) -> str:
    excluded = re.escape("".join(sorted(characters)))
    return f"(?![{excluded}])[{LETTERS}]" if excluded else f"[{LETTERS}]"


def _boundaries(spec: dict[str, Any]) -> tuple[set[str], bool] | None:
    """Return the characters that, after a letter, always have a token boundary before them.

    The second value is True if a piece must begin with a space. Returns None if a part of the tokenizer is not known.
    """
    meta = _normalizer_meta(spec["normalizer"])
    if meta is None:
        return None
    is_meta, prepends = meta
    parts = parts_of(spec["pre_tokenizer"], "pretokenizers")
    if [part["type"] for part in parts] == ["Metaspace"] and parts[0]["replacement"] == META and not is_meta:
        needs_space = parts[0]["prepend_scheme"] != "never"
        return ({" "}, needs_space) if parts[0]["split"] else _vocabulary_boundaries(spec["model"], needs_space)
    divides = [_divides(part, is_meta) for part in parts]
    if None in divides:
        return None
    if any(divides):
        return (set(FOLLOWERS), any(part.get("add_prefix_space") for part in parts)) if not is_meta else None
    if any(part["type"] != "Split" for part in parts) or not is_meta:
        return None
    return _vocabulary_boundaries(spec["model"], prepends)


def _normalizer_meta(normalizer: dict[str, Any] | None) -> tuple[bool, bool] | None:
    """Return whether a normalizer replaces spaces by META, and whether it puts META before every text.

    Returns None for a normalizer that is not known.
    """
    replaces = prepends = False
    for part in parts_of(normalizer, "normalizers"):
        if part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"] == META:
            replaces = True
        elif part["type"] == "Prepend" and part["prepend"] == META:
            prepends = True
        elif part["type"] not in ("NFC", "NFKC"):
            return None
    return None if prepends and not replaces else (replaces, prepends)


def _divides(part: dict[str, Any], is_meta: bool) -> bool | None:
    """Return True if a pre-tokenizer divides text wherever this module would cut it, and False if it divides only elsewhere.

    Returns None for a pre-tokenizer that is not known.
    """
    if part["type"] == "ByteLevel":
        return bool(part["use_regex"])
    if part["type"] == "Digits":
        return False
    if part["type"] != "Split":
        return None
    if part["pattern"] == {"String": " "} and is_meta:
        return False  # the normalizer has replaced all spaces, so the pattern never matches
    pattern, keeps = part["pattern"].get("Regex"), (part["behavior"], part["invert"])
    if pattern in PART_PATTERNS and keeps == ("Isolated", False):
        return False
    # Both behaviours divide the text into the matches of the pattern, and the matches together are the whole text.
    return True if pattern in WORD_PATTERNS and keeps in (("Isolated", False), ("Removed", True)) else None


def _vocabulary_boundaries(model: dict[str, Any], needs_space: bool) -> tuple[set[str], bool] | None:
    """Return the boundaries of a BPE model that merges over a whole text, in the form of `_boundaries`.

    A character is no boundary if a token of the vocabulary has it directly after a letter.
    """
    joins_unknown = model.get("fuse_unk") and not has_all_bytes(model)
    others = ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or joins_unknown or any(model.get(name) for name in others):
        return None
    vocabulary = model["vocab"]
    followers = set(FOLLOWERS) - followers_in(vocabulary)
    for token in vocabulary:
        if len(token) > 6 and re.search("<0x[0-9A-F]{2}>", token):
            return None  # the token is a merge of byte tokens, whose characters are not those of the text
        if re.search(f"[^{META}]{META}", token):
            followers.discard(" ")
    return followers, needs_space


def has_all_bytes(model: dict[str, Any]) -> bool:
    """Return whether a character outside the vocabulary becomes byte tokens, so that no character of a text is lost or joined."""
    return bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))


def pieces_of(text: str, cuts: Cuts | None, piece_chars: int) -> Iterator[str]:
    """Divide `text` at safe cuts into pieces of `piece_chars` characters or a little more; one piece if there is no cut."""
    start = 0
    while cuts is not None and (cut := cuts.find(text, start + piece_chars)) is not None:
        yield text[start:cut]
        start = cut + cuts.drops_space
    yield text[start:]
