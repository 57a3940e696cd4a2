"""Helpers of all kernel benchmark cases: the `Launch` type, random tensors and block tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

BLOCK = 64  # tokens in a block of the KV cache
DTYPE = torch.bfloat16


class Launch(NamedTuple):
    """A kernel launch to measure, or a chain of launches that counts as one, with its own tensors."""

    run: Callable[[], object]
    num_bytes: int  # the fewest bytes that the launch must read and write
    operations: int  # floating-point operations, two for each multiply-add; 0 if memory alone bounds the launch


def random(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=DTYPE, device=device)


def block_tables(device: torch.device, seqs: int, context: int) -> torch.Tensor:
    """Make block tables [seqs, blocks] int32 for sequences of `context` tokens, with all KV blocks in random order."""
    width = -(-context // BLOCK)
    return torch.randperm(seqs * width, device=device).to(torch.int32).view(seqs, width)
