"""Defines the workloads of `tidegate bench offline`: prompts of random token ids, each with a number of output tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import NamedTuple

from engine.errors import ConfigError

VOCAB = 10_000  # token ids are random from 0 to this, or to the model's last id if that is smaller
_WARM_UP_PROMPT = 8  # prompt tokens of a request in the warm-up
_WARM_UP_TOKENS = 8  # fewest tokens that a request in the warm-up generates
_WARM_UP_SHRINK = 0.85  # share of the requests left after each warm-up step, so that each CUDA graph size gets a batch


class Work(NamedTuple):
    prompt: list[int]
    num_outputs: int


def mixed(n: int, *, low: int = 100, high: int = 1024, vocab: int = VOCAB, seed: int = 0) -> list[Work]:
    """Return `n` requests with random prompt and output lengths from `low` to `high` tokens, both inclusive.

    All prompts are generated before the first output length. Another order would give another workload for the same seed.
    """
    randint = random.Random(seed).randint
    prompts = []
    for _ in range(n):
        length = randint(low, high)
        prompts.append([randint(0, vocab) for _ in range(length)])
    return [Work(prompt, randint(low, high)) for prompt in prompts]


def fixed(n: int, num_prompt: int, num_outputs: int, *, vocab: int = VOCAB, seed: int = 1) -> list[Work]:
    """Return `n` requests with random prompts of `num_prompt` tokens, each of which generates `num_outputs` tokens."""
    randint = random.Random(seed).randint
    return [Work([randint(0, vocab) for _ in range(num_prompt)], num_outputs) for _ in range(n)]


# Every engine is measured on the same token lists. A changed seed or order makes old results incomparable.
WORKLOADS: dict[str, Callable[[int], list[Work]]] = {  # the argument is the highest token id that may occur
    "single": lambda vocab: fixed(1, 1024, 256, vocab=vocab),
    "decode64": lambda vocab: fixed(64, 128, 256, vocab=vocab),
    "mixed256": lambda vocab: mixed(256, vocab=vocab),
    "mixed1024": lambda vocab: mixed(1024, vocab=vocab),
    "prefill": lambda vocab: fixed(32, 8192, 1, vocab=vocab),
    "long32k": lambda vocab: fixed(16, 32000, 256, vocab=vocab),
    "long120k": lambda vocab: fixed(1, 120000, 128, vocab=vocab),
}


def build_workload(name: str, vocab_size: int = VOCAB + 1) -> list[Work]:
    """Return the workload `name`. All models with more than 10,000 token ids get the same prompts. For a smaller vocabulary, the
    random ids are limited to it.

    Raises ConfigError for an unknown name.
    """
    if name not in WORKLOADS:
        raise ConfigError(f"workload is {name!r}: it must be one of {', '.join(WORKLOADS)}", param="workload")
    return WORKLOADS[name](min(VOCAB, vocab_size - 1))


def longest(work: list[Work]) -> int:
    """Return the tokens of the longest request, prompt and output together. The model's context must be at least this long."""
    return max(len(w.prompt) + w.num_outputs for w in work)


def warm_up_of(work: list[Work], max_num_seqs: int) -> list[list[Work]]:
    """Return the warm-up of a workload: two lists of requests, which the benchmark runs one after the other.

    The first list holds one request with the workload's longest prompt, which makes the largest steps. The second list holds as
    many short requests as the workload runs at once. These end a few at a time, so that the CUDA graphs of all batch sizes are
    captured.
    """
    num = min(len(work), max_num_seqs)
    at_once = []
    for rank, w in enumerate(work[:num], 1):
        extra = int(math.log(num / rank) / -math.log(_WARM_UP_SHRINK))
        at_once.append(Work(w.prompt[:_WARM_UP_PROMPT], min(w.num_outputs, _WARM_UP_TOKENS + extra)))
    largest = max(work, key=lambda w: len(w.prompt))
    return [[Work(largest.prompt, min(largest.num_outputs, _WARM_UP_TOKENS))], at_once]
