"""Attention of long whole prompts by cuDNN, through torch. 8,192 tokens of 32 heads take 936 us, and 1,284 us with our kernel.

cuDNN plans a kernel the first time it sees a length (`plans.py`). The plan also depends on the number of prompts in a call,
and on whether the prompts needed padding, since padding changes the strides of q, k and v. Lengths are therefore rounded up to
multiples of LENGTH_STEP, and `warmup_lengths` lists the usual plans.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.attention.plans import Plan, Plans
from engine.batch import ForwardBatch
from engine.kernels.hardware import is_gpu

MIN_PROMPT = 1024  # tokens; shorter prompts go to our kernel, which attends from all chunks of a step in one launch
LENGTH_STEP = 512  # tokens; lengths are padded to a multiple of this


def warmup_lengths(most: int, dtype: torch.dtype) -> list[int]:
    """List a prompt length of up to `most` tokens for each cuDNN plan that a server usually needs.

    For each multiple of LENGTH_STEP the list has one length that needs padding. It also has `most` if `most` needs no padding: a
    prompt that is longer than a step begins with a chunk of `most` tokens. It is empty for a dtype that cuDNN does not take.
    """
    if not _takes(dtype):
        return []
    padded = [min(end - 1, most) for end in range(MIN_PROMPT + LENGTH_STEP, most + LENGTH_STEP, LENGTH_STEP)]
    return padded if most < MIN_PROMPT or most % LENGTH_STEP else [*padded, most]


class Prompts(NamedTuple):
    """The long prompts of a step from which cuDNN attends."""

    tokens: list[range]  # the tokens of each prompt, as indices among the step's tokens
    together: bool  # the prompts have one length and are all of the step: one call attends from all of them


def find_prompts(batch: ForwardBatch, dtype: torch.dtype, plans: Plans) -> Prompts:
    """Find the long prompts of a step: the chunks without a cached prefix, of MIN_PROMPT tokens or more, for which cuDNN has a
    plan or may make one.

    There are none on a CPU, and for a dtype that cuDNN does not take.
    """
    if not (is_gpu(batch.slots.device) and _takes(dtype)):
        return Prompts([], False)
    ends = itertools.accumulate(batch.query_lens_host)
    lens = zip(ends, batch.query_lens_host, batch.kv_lens_host, strict=True)
    prompts = [range(end - num, end) for end, num, length in lens if num == length >= MIN_PROMPT]
    if _fill_step(prompts, batch.num_tokens) and plans.take({_plan(len(prompts[0]), len(prompts))}):
        return Prompts(prompts, True)
    return Prompts([prompt for prompt in prompts if plans.take({_plan(len(prompt), 1)})], False)


def _fill_step(prompts: list[range], num_tokens: int) -> bool:
    return len({len(prompt) for prompt in prompts}) == 1 and sum(map(len, prompts)) == num_tokens


def _plan(length: int, num: int) -> Plan:
    padding = -length % LENGTH_STEP
    return Plan(length + padding, length + padding, True, sequences=num, padded=padding > 0, with_lse=False)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, num: int = 1) -> torch.Tensor:
    """Attend causally within each of `num` prompts of one length, which lie one after another in q, k and v.

    q [T, heads, dim], k [T, kv_heads, dim], v [T, kv_heads, v_dim] -> [T, heads, v_dim]. Prompts are padded at their ends. Causal
    attention hides the padding from all tokens, and the rows of the padding are cut off.
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
    """Whether cuDNN's attention takes queries of `dtype`."""
    return dtype != torch.float32
