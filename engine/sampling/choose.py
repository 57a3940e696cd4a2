"""From adjusted logits to a token: temperature, top_k, top_p, min_p, and the inverse of the distribution function.

Every filter is a threshold on the logits, so the distribution keeps the vocabulary's order and nothing is scattered back:

    top_k   the k-th largest logit
    top_p   the last logit of the smallest set, likeliest first, that holds `top_p` of what top_k left
    min_p   the logit of a token `min_p` times as likely as the likeliest

A token must pass all three; tokens tied with the threshold pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

COLDEST = 1e-30  # what a lower temperature is taken for: float32 ends at 1e-45, and GPUs flush to 0 from 1e-38 down
_CHUNK = 128  # tokens summed before the float64 scan: the scan is then short, and most of the work one plain sum
_PARTIAL_SORT = 1024  # where every row's top_k is at most this, only so many logits are sorted


class Choice(NamedTuple):
    """How each row chooses; all [N] float64, on the logits' device. All but `uniform` are named as in SamplingParams."""

    uniform: torch.Tensor
    temperature: torch.Tensor  # at least COLDEST
    top_k: torch.Tensor  # the vocabulary's size where there is no limit
    top_p: torch.Tensor
    min_p: torch.Tensor


COLUMNS = Choice._fields[1:]  # what the sampler keeps of each row; a field added to Choice is kept by that alone


def choose(logits: torch.Tensor, choice: Choice, sorted_rows: torch.Tensor | None, max_top_k: int) -> torch.Tensor:
    """Draw one token a row, [N], from `logits` [N, V].

    `sorted_rows` are the indices of the rows with a top_k or top_p, None where there are none; `max_top_k` is the largest
    top_k among them.
    """
    # The largest is subtracted first, so that a temperature near zero cannot overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)) / choice.temperature.float()[:, None]  # [N, V], largest 0
    threshold = choice.min_p.log().float()  # [N]; -inf where min_p is 0
    if sorted_rows is not None:
        some = _threshold(scaled[sorted_rows], choice.top_k[sorted_rows], choice.top_p[sorted_rows], max_top_k)
        threshold = threshold.index_copy(0, sorted_rows, torch.maximum(threshold[sorted_rows], some))
    weights = scaled.masked_fill(scaled < threshold[:, None], float("-inf")).exp()
    return inverse_cdf(weights, choice.uniform)


def _threshold(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, max_top_k: int) -> torch.Tensor:
    """The smallest logit that passes top_k and top_p in each row, [N]."""
    partial = max_top_k <= _PARTIAL_SORT
    values = scaled.topk(max_top_k).values if partial else scaled.sort(descending=True).values  # [N, K], largest first
    within_k = torch.arange(values.shape[1], device=values.device) < top_k[:, None]
    weights = values.double().exp() * within_k
    before = weights.cumsum(-1) - weights  # weight of the likelier ones
    limit = torch.where(top_p < 1.0, top_p * weights.sum(-1), float("inf"))
    kept = ((before < limit[:, None]) & within_k).sum(-1).clamp_(min=1)
    return values.gather(1, kept[:, None] - 1)[:, 0]


def inverse_cdf(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """First index in each row at which the running sum of `weights` [N, V] exceeds `uniform` times their total; [N]."""
    rows, vocab = weights.shape
    if vocab % _CHUNK:
        weights = torch.nn.functional.pad(weights, (0, _CHUNK - vocab % _CHUNK))
    chunks = weights.view(rows, -1, _CHUNK)
    sums = chunks.sum(-1, dtype=torch.float64).cumsum(-1)  # [N, chunks]
    target = _below(uniform * sums[:, -1], sums[:, -1])
    chunk = (sums <= target[:, None]).sum(-1)  # [N]
    base = torch.where(chunk > 0, sums.gather(1, (chunk - 1).clamp_(min=0)[:, None])[:, 0], 0.0)
    inside = chunks.gather(1, chunk[:, None, None].expand(-1, 1, _CHUNK))[:, 0].double().cumsum(-1)  # [N, _CHUNK]
    rest = _below(target - base, inside[:, -1])
    return chunk * _CHUNK + (inside <= rest[:, None]).sum(-1)


def _below(x: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """`x`, or the number just below `limit`: a target that rounding put on the total would choose a token of weight 0."""
    return torch.minimum(x, torch.nextafter(limit, torch.zeros_like(limit)))
