"""Turns bad words, which are texts, into the token sequences that a model would write them with."""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import InvalidRequest
from engine.request import MAX_BAD_WORD_TOKENS
from server.text.tokenizer import Tokenizer


def bad_word_tokens(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Return the token sequences of each word: as it stands, with one space before it, and inside of a line.

    Most vocabularies have other tokens for a word after a space than for one at the start of a text or inside of another word.
    Raises InvalidRequest, naming the word, if it has no tokens or too many.
    """
    found: dict[tuple[int, ...], None] = {}
    for i, word in enumerate(words):
        sequences = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in _variants(word)]
        sequences.append(_inside(tokenizer, word.lstrip() or word))
        if not any(sequences):
            raise InvalidRequest(f"bad_words[{i}] has no tokens in this model's vocabulary", param="bad_words")
        longest = max(map(len, sequences))
        if longest > MAX_BAD_WORD_TOKENS:
            raise InvalidRequest(
                f"bad_words[{i}] has {longest} tokens: at most {MAX_BAD_WORD_TOKENS} are allowed", param="bad_words"
            )
        found |= dict.fromkeys(filter(None, sequences))
    return tuple(found)


def _variants(word: str) -> list[str]:
    bare = word.lstrip()
    return [word, bare, f" {bare}"] if bare else [word]


def _inside(tokenizer: Tokenizer, word: str) -> tuple[int, ...]:
    """Return the tokens of `word` after a line break, where SentencePiece writes no space before it; () if that is unknown."""
    line, whole = (tokenizer.encode(text, add_special_tokens=False) for text in ("\n", f"\n{word}"))
    return tuple(whole[len(line) :]) if line and whole[: len(line)] == line else ()
