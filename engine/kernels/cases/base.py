"""What all cases share: the launch, and tensors for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

BLOCK = 64  # tokens in a block of the cache
DTYPE = torch.bfloat16


class Launch(NamedTuple):
    """One launch, over tensors of its own."""

    run: Callable[[], object]
    num_bytes: int  # that must be read or written
    operations: int  # two for each multiply-add; 0 where memory alone counts


def random(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=DTYPE, device=device)


def block_tables(device: torch.device, seqs: int, context: int) -> torch.Tensor:
    """[seqs, blocks] int32, of sequences whose blocks lie scattered."""
    width = -(-context // BLOCK)
    return torch.randperm(seqs * width, device=device).to(torch.int32).view(seqs, width)
