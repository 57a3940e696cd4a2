"""Rules that all adaptive limits keep.

Prompts always advance, and a short prompt does not queue behind a long one. No target is chased at any price: a slow device, such
as a CPU, may need most of the time that a class promises between two tokens for the smallest step. Small steps would then gain
some milliseconds between tokens, and lose seconds until the first one. So steps may then take RELIEF times as long as the
smallest.
"""

from __future__ import annotations

from engine.scheduler.limits import StepLimits

FEWEST_TOKENS = 16  # prompt tokens that a step has room for, whatever its decodes take
FEWEST_SEQS = 4  # fewer would not make steps short that are too long with these
FEWEST_CHUNK = 64  # a smaller chunk would cost a long prompt more than it gives a short one


ROOM = 1.25  # a step must be able to take this many times as long as the smallest, or there is no use in keeping the target
RELIEF = 3.0


def make_limits(tokens: int, seqs: int) -> StepLimits:
    """Return limits by which one prompt takes half of a step while others want a part of it."""
    return StepLimits(tokens, seqs, min(tokens, max(FEWEST_CHUNK, tokens // 2)))


def with_room(limits: StepLimits, decodes: int, most: int) -> StepLimits:
    """Return `limits` with at least FEWEST_TOKENS tokens for prompts beside `decodes`, but at most `most` tokens in all."""
    tokens = min(most, decodes + FEWEST_TOKENS)
    return limits if limits.tokens >= tokens else limits._replace(tokens=tokens)
