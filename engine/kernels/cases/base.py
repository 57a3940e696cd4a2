"""What all cases share: the Launch, and random tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

BLOCK = 64  # tokens in a block of the cache
DTYPE = torch.bfloat16


class Launch(NamedTuple):
    """One launch, or a chain of launches that counts as one, with tensors of its own."""

    run: Callable[[], object]
    num_bytes: int  # the least that must be read and written
    operations: int  # floating-point operations, two for each multiply-add; 0 if memory alone bounds the launch


def random(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=DTYPE, device=device)


def block_tables(device: torch.device, seqs: int, context: int) -> torch.Tensor:
    """Block tables [seqs, blocks] int32 of sequences of `context` tokens, with all blocks in random order."""
    width = -(-context // BLOCK)
    return torch.randperm(seqs * width, device=device).to(torch.int32).view(seqs, width)
