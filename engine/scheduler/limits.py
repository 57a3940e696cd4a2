"""What the scheduler and the controller of the batch tell each other: the load before a step, the step's limits, its shape."""

from __future__ import annotations

from typing import NamedTuple

from engine.plan import StepPlan


class StepLimits(NamedTuple):
    """The limits of one step.

    `tokens` bounds all tokens of the step. `seqs` bounds the requests that run: none is admitted beyond it, and those that run
    already go on. `chunk` bounds the slice of one prompt while other prompts want a part of the step.
    """

    tokens: int
    seqs: int
    chunk: int


class Load(NamedTuple):
    """What the scheduler holds before a step."""

    decodes: int  # requests that run one token in the step
    kv_tokens: int  # tokens of KV that these decodes read
    running: int  # requests with a batch row: decodes, and prompts that are partly computed
    waiting: int  # requests in the queue
    prompt_tokens: int  # uncomputed prompt tokens of running and waiting requests
    context: int  # computed tokens of the prompt that the step continues first; 0 if it begins one
    itl: float | None  # seconds: the tightest inter-token target among the decodes; None: nothing is promised to them


# A chunk with more pairs of a prompt token and a token that it attends to is long. A GPU computes its further pairs up to twice
# as fast, by other kernels (docs/gpu.md).
LONG_PAIRS = 1 << 24


class StepShape(NamedTuple):
    """What a step computes, as far as its duration depends on it."""

    decodes: int  # slices of one token each
    kv_tokens: int  # cached tokens of KV that the decodes read, and the prompt chunks, each once
    prompt_tokens: int  # tokens of the prompt chunks
    attention: int  # pairs of a prompt token and a token that it attends to, up to LONG_PAIRS of each chunk
    long_attention: int = 0  # the other pairs

    @staticmethod
    def of(plan: StepPlan) -> StepShape:
        decodes = plan.num_decodes
        starts, nums = plan.starts, plan.nums
        prompt_tokens = attention = long_attention = 0
        for i in range(decodes, len(nums)):
            num = nums[i]
            prompt_tokens += num
            own = num * starts[i] + num * (num + 1) // 2
            if own > LONG_PAIRS:
                long_attention += own - LONG_PAIRS
                own = LONG_PAIRS
            attention += own
        return StepShape(decodes, sum(starts) + decodes, prompt_tokens, attention, long_attention)

    @staticmethod
    def with_chunk(decodes: int, kv_tokens: int, tokens: int, context: int) -> StepShape:
        """Return the shape of a step of `decodes` that read `kv_tokens`, and one chunk of `tokens` behind `context` others."""
        num = pairs(tokens, context)
        return StepShape(decodes, kv_tokens + context, tokens, min(num, LONG_PAIRS), max(0, num - LONG_PAIRS))


def pairs(tokens: int, context: int) -> int:
    """Return the number of pairs of a prompt token and a token that it attends to, for `tokens` tokens after `context` others."""
    return tokens * context + tokens * (tokens + 1) // 2
