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


class StepShape(NamedTuple):
    """What a step computes, as far as its duration depends on it."""

    decodes: int  # slices of one token each
    kv_tokens: int  # tokens of KV that the decodes read
    prompt_tokens: int  # tokens of the prompt chunks
    attention: int  # pairs of a prompt token and a token that it attends to

    @staticmethod
    def of(plan: StepPlan) -> StepShape:
        decodes = plan.num_decodes
        starts, nums = plan.starts, plan.nums
        prompt_tokens = attention = 0
        for i in range(decodes, len(nums)):
            num = nums[i]
            prompt_tokens += num
            attention += num * starts[i] + num * (num + 1) // 2
        return StepShape(decodes, sum(starts[:decodes]) + decodes, prompt_tokens, attention)
