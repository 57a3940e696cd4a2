"""Long prompts that begin with this step, which cuDNN attends to: its kernel is a third faster than ours there (docs/gpu.md).

It plans for every length, for every number of prompts that it is given together, and once more where nothing has to be padded,
for then q, k and v lie otherwise in memory. So lengths are rounded up to whole LENGTH_STEPs, and the usual kinds can be asked for
before anybody waits for them (`kinds`).
"""

from __future__ import annotations

import itertools

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.batch import ForwardBatch

MIN_PROMPT = 1024  # tokens; below, our kernel does all chunks of a step in one launch
LENGTH_STEP = 512


def kinds(most: int, dtype: torch.dtype) -> list[int]:
    """A length of each usual kind up to `most` tokens: one prompt at a time that has to be padded, and `most` itself, which is
    what a step takes first of one that is longer."""
    if not _takes(dtype):
        return []
    padded = [min(end - 1, most) for end in range(MIN_PROMPT + LENGTH_STEP, most + LENGTH_STEP, LENGTH_STEP)]
    return padded if most < MIN_PROMPT or most % LENGTH_STEP else [*padded, most]


def find(batch: ForwardBatch, dtype: torch.dtype) -> list[range]:
    """The tokens of each: of chunks that are whole prompts, from their start, and long enough to pay for a call of their own."""
    if not (batch.slots.is_cuda and _takes(dtype)):
        return []
    ends = itertools.accumulate(batch.query_lens_host)
    lens = zip(ends, batch.query_lens_host, batch.kv_lens_host, strict=True)
    return [range(end - num, end) for end, num, length in lens if num == length >= MIN_PROMPT]


def fill(prompts: list[range], num_tokens: int) -> bool:
    """Whether these prompts, of one length, are all that a step has."""
    return len({len(prompt) for prompt in prompts}) == 1 and sum(map(len, prompts)) == num_tokens


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, num: int = 1) -> torch.Tensor:
    """Causal attention of `num` prompts of one length, end to end: q [T, heads, dim], k and v [T, kv_heads, dim] -> [T, heads,
    dim]. What the rows that pad give is cut off, and no other row sees them. A kind's first takes 65 to 70 ms more, the very
    first a second.
    """
    length = q.shape[0] // num
    padding = -length % LENGTH_STEP
    apart = (x.view(num, length, *x.shape[1:]) for x in (q, k, v))
    padded = (F.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x for x in apart)
    queries, keys, values = (x.transpose(1, 2) for x in padded)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)[:, :length].flatten(0, 1)


def _takes(dtype: torch.dtype) -> bool:
    return dtype != torch.float32
