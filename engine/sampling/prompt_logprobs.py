"""Log-probabilities of prompt tokens: finds the positions of a step that report any, and computes the values.

A prompt may be computed in several slices of plans. A slice reports the token after each of its positions. The slice that ends
the prompt reports nothing at its last position, since the token after that position is sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from engine.batch import Upload
from engine.sampling.logprobs import LogprobTensors, log_probabilities
from engine.sampling.rows import Ints, RowParams

_CHUNK_ELEMENTS = 1 << 25  # most logits in memory at a time: 128 MiB in float32


class PromptSlices(NamedTuple):
    """The W slices of a step that lie in prompts whose log-probabilities are requested."""

    slices: Ints  # [W]: indices into the plan's slices
    nums: Ints  # [W]: positions, from each slice's start, that report the token after them
    num_top: Ints  # [W]: alternatives that each of those positions reports


class PromptPositions(NamedTuple):
    """The N positions of a step that report the prompt token after them."""

    slices: list[int]  # [N]: the slice that each position belongs to
    num_top: list[int]  # [N]: alternatives that each position reports
    places: Ints  # [N]: index of each position among the step's tokens
    tokens: Ints  # [N]: the prompt token after each position


def find_slices(params: RowParams, rows: Ints, starts: Ints, ends: Ints) -> PromptSlices | None:
    """Find the slices that report prompt log-probabilities; None if no slice does.

    Slice i is positions [starts[i], ends[i]) of batch row rows[i].
    """
    records = params.table[rows]
    slices = np.flatnonzero(records["wants_prompt_logprobs"] & (starts < records["num_prompt"]))
    if not slices.size:
        return None
    nums: Ints = np.minimum(ends, records["num_prompt"] - 1)[slices] - starts[slices]
    return PromptSlices(slices, nums, records["prompt_logprobs"][slices])


def positions(found: PromptSlices, first: Ints, starts: Ints, tokens: Sequence[Ints]) -> PromptPositions:
    """List the positions that the slices `found` report.

    For each of the step's B slices, `first` is the index of its first token among the step's tokens, and `starts` the position of
    that token. tokens[i] are the known tokens of the row of the i-th slice of `found`.
    """
    slices, nums, num_top = found
    spans = list(zip(slices.tolist(), nums.tolist(), tokens, strict=True))
    return PromptPositions(
        np.repeat(slices, nums).tolist(),
        np.repeat(num_top, nums).tolist(),
        np.concatenate([np.arange(first[s], first[s] + num) for s, num, _ in spans]),
        np.concatenate([known[starts[s] + 1 : starts[s] + 1 + num] for s, num, known in spans]),
    )


def compute(
    wanted: PromptPositions,
    hidden: torch.Tensor,
    logits: Callable[[torch.Tensor], torch.Tensor],
    *,
    vocab_size: int,
    upload: Upload,
) -> LogprobTensors:
    """Compute the log-probabilities at N >= 1 positions, from hidden [T, H] of all the step's tokens.

    The positions are computed in chunks, to bound the memory of the logits.
    """
    index, tokens = upload([wanted.places, wanted.tokens])
    states, num_top = hidden.index_select(0, index), max(wanted.num_top)
    size = max(1, _CHUNK_ELEMENTS // vocab_size)
    parts = [
        log_probabilities(logits(h).float().log_softmax(-1), t, num_top)
        for h, t in zip(torch.split(states, size), torch.split(tokens, size), strict=True)
    ]
    return LogprobTensors(*(torch.cat(field) for field in zip(*parts, strict=True)))
