"""Log-probabilities in the forms that the routes answer with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.request import TokenLogprobs

TokenText = Callable[[int], str]
TokenBytes = Callable[[int], bytes]
_LOWEST = -9999.0  # JSON has no minus infinity; this is what OpenAI sends for it


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST else _LOWEST  # also for NaN


def own_form(position: TokenLogprobs, text: TokenText) -> dict[str, Any]:
    """As in `schemas.generate.TokenInfo`."""
    top = zip(position.top_ids, position.top_logprobs, strict=True)
    return {
        "token_id": position.token,
        "text": text(position.token),
        "logprob": _finite(position.logprob),
        "rank": position.rank,
        "top": [{"token_id": token, "text": text(token), "logprob": _finite(logprob)} for token, logprob in top],
    }


def own_list(positions: list[TokenLogprobs | None] | list[TokenLogprobs], text: TokenText) -> list[dict[str, Any] | None]:
    return [None if position is None else own_form(position, text) for position in positions]


def chat_form(positions: list[TokenLogprobs], text: TokenText, bytes_of: TokenBytes) -> dict[str, Any]:
    """As in `schemas.openai.ChatLogprobs`. `bytes` lets a client join characters that lie across tokens."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token": text(token), "logprob": _finite(logprob), "bytes": list(bytes_of(token))}

    def at(position: TokenLogprobs) -> dict[str, Any]:
        top = zip(position.top_ids, position.top_logprobs, strict=True)
        return {**one(position.token, position.logprob), "top_logprobs": [one(*pair) for pair in top]}

    return {"content": [at(position) for position in positions], "refusal": None}


def completion_form(
    positions: list[TokenLogprobs | None], first_token: int | None, num_top: int, offset: int, text: TokenText
) -> dict[str, Any]:
    """As in `schemas.openai.CompletionLogprobs`. `offset` is where in the choice's text the first position begins.

    A None stands for a prompt's first token, which nothing predicts; it is `first_token`.
    """
    tokens: list[str] = []
    offsets: list[int] = []
    for position in positions:
        word = text(position.token if position is not None else first_token or 0)
        tokens.append(word)
        offsets.append(offset)
        offset += len(word)
    return {
        "tokens": tokens,
        "token_logprobs": [None if p is None else _finite(p.logprob) for p in positions],
        "top_logprobs": [None if p is None else _top_map(p, num_top, text) for p in positions] if num_top else None,
        "text_offset": offsets,
    }


def _top_map(position: TokenLogprobs, num_top: int, text: TokenText) -> dict[str, float]:
    top = zip(position.top_ids[:num_top], position.top_logprobs[:num_top], strict=True)
    found: dict[str, float] = {}
    for token, logprob in top:
        found.setdefault(text(token), _finite(logprob))  # two tokens with one text: the likelier one stays
    found.setdefault(text(position.token), _finite(position.logprob))
    return found


def prompt_form(positions: list[TokenLogprobs | None], text: TokenText) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: at each position, token id -> {logprob, rank, decoded_token}."""

    def at(position: TokenLogprobs) -> dict[str, Any]:
        top = enumerate(zip(position.top_ids, position.top_logprobs, strict=True), 1)
        found = {str(t): {"logprob": _finite(lp), "rank": rank, "decoded_token": text(t)} for rank, (t, lp) in top}
        chosen = {"logprob": _finite(position.logprob), "rank": position.rank, "decoded_token": text(position.token)}
        return {**found, str(position.token): chosen}

    return [None if position is None else at(position) for position in positions]
