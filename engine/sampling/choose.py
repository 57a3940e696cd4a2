"""Chooses tokens from adjusted logits: argmax, or temperature, top_k, top_p, min_p and inverse transform sampling.

Every filter is a threshold on the logits, so the distribution keeps the vocabulary's order and nothing is scattered back:

    top_k   the k-th largest logit
    top_p   the last logit of the smallest set, most probable first, that holds `top_p` of the probability that top_k left
    min_p   the logit of a token with `min_p` times the probability of the most probable token

A token must pass all three; tokens tied with the threshold pass. A row whose largest logit is not finite, because its logits
hold NaN or +inf or are all -inf, gets NO_TOKEN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from engine.plan import NO_TOKEN

# A lower temperature is raised to this one: float32 ends at 1e-45, and GPUs flush numbers below 1e-38 to 0.
LOWEST_TEMPERATURE = 1e-30
_CHUNK = 128  # the weights of this many tokens are summed before the float64 scan, which is short then
_PARTIAL_SORT = 1024  # if no row's top_k is larger than this, only the largest top_k logits are sorted


class Choice(NamedTuple):
    """The random number and the sampling parameters of N rows, [N] float64 each, on the logits' device.

    All fields but `uniform` have the names of fields of SamplingParams.
    """

    uniform: torch.Tensor  # in [0, 1)
    temperature: torch.Tensor  # at least LOWEST_TEMPERATURE
    top_k: torch.Tensor  # the vocabulary's size if there is no limit
    top_p: torch.Tensor
    min_p: torch.Tensor


COLUMNS = Choice._fields[1:]  # the sampler stores these parameters for each row, so it also stores a field added to Choice


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the index of the largest logit in each row of logits [N, V], as [N] int64. Of equal logits the first counts.

    A row whose largest logit is not finite gets NO_TOKEN.
    """
    tokens = logits.argmax(-1)  # torch takes NaN for the largest
    return _mark_failed(tokens, logits.gather(1, tokens[:, None])[:, 0])


def _mark_failed(tokens: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Return `tokens` [N] with NO_TOKEN in the rows whose `largest` logit [N] is not finite."""
    return torch.where(largest.abs() < float("inf"), tokens, NO_TOKEN)


def choose(logits: torch.Tensor, choice: Choice, sorted_rows: torch.Tensor | None, max_top_k: int) -> torch.Tensor:
    """Sample one token per row, [N] int64, from `logits` [N, V].

    `sorted_rows` are the indices of the rows with a top_k or top_p, or None if there are none; `max_top_k` is the largest
    top_k among them.
    """
    largest = logits.amax(-1)  # the result is NaN for a row that holds NaN
    # The largest logit is subtracted first, so that a temperature near zero cannot overflow.
    scaled = (logits - largest[:, None]) / choice.temperature.float()[:, None]  # [N, V]; the largest of a row is 0
    threshold = choice.min_p.log().float()  # [N]; -inf if min_p is 0
    if sorted_rows is not None:
        some = _threshold(scaled[sorted_rows], choice.top_k[sorted_rows], choice.top_p[sorted_rows], max_top_k)
        threshold = threshold.index_copy(0, sorted_rows, torch.maximum(threshold[sorted_rows], some))
    weights = scaled.masked_fill(scaled < threshold[:, None], float("-inf")).exp()
    return _mark_failed(inverse_cdf(weights, choice.uniform), largest)


def _threshold(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, max_top_k: int) -> torch.Tensor:
    """Find the smallest logit that passes top_k and top_p in each row -> [N]."""
    partial = max_top_k <= _PARTIAL_SORT
    values = scaled.topk(max_top_k).values if partial else scaled.sort(descending=True).values  # [N, K], largest first
    within_k = torch.arange(values.shape[1], device=values.device) < top_k[:, None]
    weights = values.double().exp() * within_k
    before = weights.cumsum(-1) - weights  # weight of the more probable tokens
    limit = torch.where(top_p < 1.0, top_p * weights.sum(-1), float("inf"))
    kept = ((before < limit[:, None]) & within_k).sum(-1).clamp_(min=1)
    return values.gather(1, kept[:, None] - 1)[:, 0]


def inverse_cdf(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Find the first index in each row at which the running sum of `weights` [N, V] exceeds `uniform` times their total.

    The result is [N] int64.
    A row with NaN weights gives index 0.
    """
    rows, vocab = weights.shape
    if vocab % _CHUNK:
        weights = torch.nn.functional.pad(weights, (0, _CHUNK - vocab % _CHUNK))
    chunks = weights.view(rows, -1, _CHUNK)
    sums = chunks.sum(-1, dtype=torch.float64).cumsum(-1)  # [N, chunks]: running sums of the chunks' weights
    target = _below(uniform * sums[:, -1], sums[:, -1])
    chunk = (sums <= target[:, None]).sum(-1)  # [N]: the chunk that holds the sampled token
    base = torch.where(chunk > 0, sums.gather(1, (chunk - 1).clamp_(min=0)[:, None])[:, 0], 0.0)
    inside = chunks.gather(1, chunk[:, None, None].expand(-1, 1, _CHUNK))[:, 0].double().cumsum(-1)  # [N, _CHUNK]
    rest = _below(target - base, inside[:, -1])
    return chunk * _CHUNK + (inside <= rest[:, None]).sum(-1)


def _below(x: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Return the smaller of `x` and the number just below `limit`.

    Rounding may make a target equal to the total of all weights. That target would choose a token of weight 0.
    """
    return torch.minimum(x, torch.nextafter(limit, torch.zeros_like(limit)))
