"""Brings answers in OpenAI's form to the shape that the tests compare. Programs of clients with OpenAI's types use it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def usage(given: Any) -> dict[str, int] | None:
    return given and {"prompt_tokens": given.prompt_tokens, "completion_tokens": given.completion_tokens}


def chat_logprobs(given: Any) -> list[Any] | None:
    """Return [token, log-probability, [[alternative, log-probability], ...]] for each token."""
    if given is None or given.content is None:
        return None
    return [[at.token, at.logprob, [[top.token, top.logprob] for top in at.top_logprobs or ()]] for at in given.content]


def text_logprobs(given: Any) -> list[Any] | None:
    """Return [token, log-probability, {alternative: log-probability}] for each token of a completion."""
    if given is None:
        return None
    tops = given.top_logprobs or [None] * len(given.tokens)
    return [list(at) for at in zip(given.tokens, given.token_logprobs, tops, strict=True)]


def chat(answer: Any) -> dict[str, Any]:
    choices = [
        {"text": choice.message.content, "finish_reason": choice.finish_reason, "logprobs": chat_logprobs(choice.logprobs)}
        for choice in answer.choices
    ]
    return {"choices": choices, "usage": usage(answer.usage)}


def completion(answer: Any) -> dict[str, Any]:
    choices = [
        {"text": choice.text, "finish_reason": choice.finish_reason, "logprobs": text_logprobs(choice.logprobs)}
        for choice in answer.choices
    ]
    return {"choices": choices, "usage": usage(answer.usage)}


def chat_stream(chunks: Iterable[Any]) -> dict[str, Any]:
    return _joined(chunks, lambda choice: choice.delta.content, chat_logprobs)


def completion_stream(chunks: Iterable[Any]) -> dict[str, Any]:
    return _joined(chunks, lambda choice: choice.text, text_logprobs)


def _joined(chunks: Iterable[Any], text_of: Any, logprobs_of: Any) -> dict[str, Any]:
    """Join the chunks of a stream. `pieces` is the number of chunks with text."""
    choices: dict[int, dict[str, Any]] = {}
    total, pieces = None, 0
    for chunk in chunks:
        total = usage(getattr(chunk, "usage", None)) or total
        for choice in chunk.choices:
            at = choices.setdefault(choice.index, {"text": "", "finish_reason": None, "logprobs": None})
            text = text_of(choice) or ""
            pieces += bool(text)
            at["text"] += text
            at["finish_reason"] = choice.finish_reason or at["finish_reason"]
            if logprobs := logprobs_of(getattr(choice, "logprobs", None)):
                at["logprobs"] = (at["logprobs"] or []) + logprobs
    return {"choices": [choices[index] for index in sorted(choices)], "usage": total, "pieces": pieces}
