"""Log-probabilities to report: log-softmax of the model's own logits, before bias, penalties and temperature.

That is what OpenAI's API and vLLM report: they tell what the model thinks, not how the choice was made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from engine.request import TokenLogprobs

_CHUNK_ELEMENTS = 1 << 25  # logits alive at once while a prompt's are computed: 128 MiB in float32


class LogprobTensors(NamedTuple):
    """One row a position, on the device or copied to the host; K is the largest number of alternatives asked for."""

    tokens: torch.Tensor  # [N] int64: the tokens that stand there
    logprobs: torch.Tensor  # [N] float32: theirs
    ranks: torch.Tensor  # [N] int64, 1 for the likeliest
    top_ids: torch.Tensor  # [N, K] int64, best first
    top_logprobs: torch.Tensor  # [N, K] float32


def log_probabilities(logprobs: torch.Tensor, tokens: torch.Tensor, num_top: int) -> LogprobTensors:
    """Pick from `logprobs` [N, V] what is reported about `tokens` [N]."""
    own = logprobs.gather(1, tokens[:, None])  # [N, 1]
    ranks = (logprobs > own).sum(-1) + 1
    top = logprobs.topk(num_top, dim=-1)
    return LogprobTensors(tokens, own[:, 0], ranks, top.indices, top.values)


def of_prompt(
    hidden: torch.Tensor, tokens: torch.Tensor, num_top: int, vocab_size: int, logits: Callable[[torch.Tensor], torch.Tensor]
) -> LogprobTensors:
    """What is reported about prompt `tokens` [N], given the hidden states before them [N, H]; chunked to bound memory."""
    size = max(1, _CHUNK_ELEMENTS // vocab_size)
    parts = [
        log_probabilities(logits(h).float().log_softmax(-1), t, num_top)
        for h, t in zip(torch.split(hidden, size), torch.split(tokens, size), strict=True)
    ]
    return LogprobTensors(*(torch.cat(field) for field in zip(*parts, strict=True)))


def to_records(on_host: LogprobTensors, num_top: list[int]) -> list[TokenLogprobs]:
    """The same as plain values; position i reports `num_top[i]` alternatives."""
    tokens, logprobs, ranks, top_ids, top_logprobs = (field.tolist() for field in on_host)
    return [TokenLogprobs(tokens[i], logprobs[i], ranks[i], top_ids[i][:k], top_logprobs[i][:k]) for i, k in enumerate(num_top)]
