"""CostTable: what a step costs, as numbers. The duration of a step is predicted as

    decodes alone       decode_seconds[rows padded to a size]                     + kv_tokens * kv_token_seconds
    with prompts        max(prompt_seconds(tokens), decode_seconds[rows padded])  + kv_tokens * kv_token_seconds
                                                                                  + attention * attention_pair_seconds
                                                                                  + long_attention * long_pair_seconds

`decode_seconds` is a staircase, since a captured step of decodes computes as many rows as its CUDA graph. `prompt_seconds` is
linear between its knots: with few tokens a step reads all weights and takes a constant time, and with many tokens it is bound by
arithmetic. A sum of a staircase and one slope would be a third too long between the two.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import NamedTuple

from engine.scheduler.limits import StepShape

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
MORE_ROWS = 64  # distance of the sizes that follow ROWS
FEWEST_TOKENS = 16  # first knot


def row_sizes(max_rows: int) -> list[int]:
    """Return usual sizes of a captured decode step, for an engine that does not say what sizes it captures."""
    sizes = [*ROWS, *range(ROWS[-1] + MORE_ROWS, max_rows + MORE_ROWS, MORE_ROWS)]
    return [*(size for size in sizes if size < max_rows), max_rows]


def token_knots(max_tokens: int) -> list[int]:
    """Return numbers of tokens up to `max_tokens`, two in each octave."""
    knots = []
    size = FEWEST_TOKENS
    while size < max_tokens:
        knots += [size, size * 3 // 2]
        size *= 2
    return [*(knot for knot in knots if knot < max_tokens), max_tokens]


class CostTable(NamedTuple):
    """All seconds are finite and not negative, and those of a list never fall. Sizes and knots ascend, and no list is empty."""

    decode_rows: list[int]
    decode_seconds: list[float]
    step_tokens: list[int]  # knots: all tokens of a step that contains prompts
    step_seconds: list[float]
    kv_token_seconds: float  # seconds for each cached token of KV that is read
    attention_pair_seconds: float  # seconds for each pair of a prompt token and a token that it attends to, see StepShape
    long_pair_seconds: float  # the same for further pairs of a long chunk

    def predict(self, shape: StepShape) -> float:
        """Return the seconds of a step. They never fall when a field of `shape` grows."""
        decodes, kv_tokens, prompt_tokens, attention, long_attention = shape
        seconds = self.decode(decodes) if decodes else 0.0
        if prompt_tokens:
            seconds = max(seconds, self.prompts(decodes + prompt_tokens))
            seconds += attention * self.attention_pair_seconds + long_attention * self.long_pair_seconds
        return seconds + kv_tokens * self.kv_token_seconds

    def decode(self, rows: int) -> float:
        """Return the seconds of `rows` decodes, without reading KV. Beyond the last size, they grow in proportion."""
        index = bisect_left(self.decode_rows, rows)
        if index < len(self.decode_rows):
            return self.decode_seconds[index]
        return self.decode_seconds[-1] * rows / self.decode_rows[-1]

    def prompts(self, tokens: int) -> float:
        """Return the seconds of a step of `tokens` that contains prompts, without attention to contexts."""
        knots, seconds = self.step_tokens, self.step_seconds
        above = bisect_left(knots, tokens)
        if above == len(knots):
            return seconds[-1] * tokens / knots[-1]
        high = seconds[above]
        if above == 0:
            return high
        low, start = seconds[above - 1], knots[above - 1]
        return min(high, low + (high - low) * ((tokens - start) / (knots[above] - start)))

    def resampled(self, decode_rows: Iterable[int], step_tokens: Iterable[int]) -> CostTable:
        """Return this table at other sizes and knots."""
        rows, tokens = list(decode_rows), list(step_tokens)
        return CostTable(
            rows,
            [self.decode(size) for size in rows],
            tokens,
            [self.prompts(knot) for knot in tokens],
            self.kv_token_seconds,
            self.attention_pair_seconds,
            self.long_pair_seconds,
        )
