"""The work that is measured: prompts of random token ids, and how many tokens each is answered with."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

from engine.errors import ConfigError

VOCAB = 10_000  # ids are drawn from 0 to this, or to the model's last one where it has fewer
_WARM_UP_PROMPT = 8  # tokens of a request in the warm-up, and
_WARM_UP_TOKENS = 8  # those that it generates at least
_WARM_UP_SHRINK = 0.85  # of the requests that still run, each step ends the rest: no size between CUDA graphs is passed over


class Work(NamedTuple):
    prompt: list[int]
    num_outputs: int


def mixed(n: int, *, low: int = 100, high: int = 1024, vocab: int = VOCAB, seed: int = 0) -> list[Work]:
    """`n` requests whose prompt and output lengths are each drawn from low..high; all prompts are drawn before any output."""
    draw = random.Random(seed).randint
    prompts = []
    for _ in range(n):
        length = draw(low, high)
        prompts.append([draw(0, vocab) for _ in range(length)])
    return [Work(prompt, draw(low, high)) for prompt in prompts]


def fixed(n: int, num_prompt: int, num_outputs: int, *, vocab: int = VOCAB, seed: int = 1) -> list[Work]:
    draw = random.Random(seed).randint
    return [Work([draw(0, vocab) for _ in range(num_prompt)], num_outputs) for _ in range(n)]


# The same token lists for every engine that is measured on them: a changed seed or order makes old figures incomparable.
WORKLOADS: dict[str, Callable[[int], list[Work]]] = {  # each takes the highest token id that it may draw
    "single": lambda vocab: fixed(1, 1024, 256, vocab=vocab),
    "decode64": lambda vocab: fixed(64, 128, 256, vocab=vocab),
    "mixed256": lambda vocab: mixed(256, vocab=vocab),
    "mixed1024": lambda vocab: mixed(1024, vocab=vocab),
    "prefill": lambda vocab: fixed(32, 8192, 1, vocab=vocab),
}


def build_workload(name: str, vocab_size: int = VOCAB + 1) -> list[Work]:
    """The same lists for every model of more than 10,000 tokens; ids that a smaller one has for the others."""
    if name not in WORKLOADS:
        raise ConfigError(f"workload is {name!r}: it must be one of {', '.join(WORKLOADS)}", param="workload")
    return WORKLOADS[name](min(VOCAB, vocab_size - 1))


def longest(work: list[Work]) -> int:
    """Tokens of the longest request: the context that the work takes."""
    return max(len(w.prompt) + w.num_outputs for w in work)


def warm_up_of(work: list[Work], max_num_seqs: int) -> list[list[Work]]:
    """What to run before: the longest prompt, whose steps are the largest, and then as many requests at once as the workload has,
    in few tokens and ever fewer at the end, so that the CUDA graphs of all batch sizes are captured."""
    num = min(len(work), max_num_seqs)
    at_once = []
    for rank, w in enumerate(work[:num], 1):
        extra = int(math.log(num / rank) / -math.log(_WARM_UP_SHRINK))
        at_once.append(Work(w.prompt[:_WARM_UP_PROMPT], min(w.num_outputs, _WARM_UP_TOKENS + extra)))
    largest = max(work, key=lambda w: len(w.prompt))
    return [[Work(largest.prompt, min(largest.num_outputs, _WARM_UP_TOKENS))], at_once]
