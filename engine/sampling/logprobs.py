"""Computes the log-probabilities to report: the log-softmax of the model's own logits, before bias, penalties and temperature.

OpenAI's API and vLLM report the same: the model's distribution, not the distribution that was sampled from.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from engine.request import TokenLogprobs


class LogprobTensors(NamedTuple):
    """Log-probabilities at N positions, on the device or on the host. K is the largest number of alternatives requested."""

    tokens: torch.Tensor  # [N] int64: the token at each position
    logprobs: torch.Tensor  # [N] float32: that token's log-probability
    ranks: torch.Tensor  # [N] int64: that token's rank, 1 for the most probable token
    top_ids: torch.Tensor  # [N, K] int64: the most probable tokens, best first
    top_logprobs: torch.Tensor  # [N, K] float32: log-probabilities of `top_ids`


def log_probabilities(logprobs: torch.Tensor, tokens: torch.Tensor, num_top: int) -> LogprobTensors:
    """Pick the log-probabilities of `tokens` [N], valid token ids, and of the `num_top` best tokens from `logprobs` [N, V]."""
    own = logprobs.gather(1, tokens[:, None])  # [N, 1]
    ranks = (logprobs > own).sum(-1) + 1
    top = logprobs.topk(num_top, dim=-1)
    return LogprobTensors(tokens, own[:, 0], ranks, top.indices, top.values)


def to_records(on_host: LogprobTensors, num_top: list[int]) -> list[TokenLogprobs]:
    """Convert tensors on the host to plain values. Position i reports `num_top[i]` alternatives."""
    tokens, logprobs, ranks, top_ids, top_logprobs = (field.tolist() for field in on_host)
    return [TokenLogprobs(tokens[i], logprobs[i], ranks[i], top_ids[i][:k], top_logprobs[i][:k]) for i, k in enumerate(num_top)]
