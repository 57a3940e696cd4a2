"""KVStorage: the tensors that hold the cache, any set of pools for each layer, and the copying of blocks among them.

It moves what the plan tells it to and decides nothing: who owns a block is `manager.py`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import LayerPools, PoolSpec
from engine.plan import BlockCopy


class KVStorage:
    """`layers[i]` has layer i's pools by name, each [num_blocks + 1, block_size, *shape], all zeros at first.

    The last block, `scratch_block`, belongs to no request: rows that only pad a batch write there.
    """

    def __init__(self, pools: list[list[PoolSpec]], *, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.scratch_block = num_blocks
        self.layers: list[LayerPools] = [
            {p.name: _zeros((num_blocks + 1, block_size, *p.shape), p.dtype, device) for p in layer} for layer in pools
        ]

    def copy(self, copies: list[BlockCopy], upload: Callable[[Sequence[npt.NDArray[Any]]], list[torch.Tensor]]) -> None:
        """Carry out `copies` as if one after the other, every pool of a block together."""
        for group in _independent(copies):
            src, dst = upload([np.array(column, np.int64) for column in zip(*group, strict=True)])
            for layer in self.layers:
                for pool in layer.values():
                    pool.index_copy_(0, dst, pool.index_select(0, src))


def _independent(copies: list[BlockCopy]) -> list[list[BlockCopy]]:
    """Cut the list where a copy reads or overwrites what one before it wrote: within a group all may be done at once."""
    groups: list[list[BlockCopy]] = []
    written: set[int] = set()
    for copy in copies:
        if not groups or copy.src in written or copy.dst in written:
            groups.append([])
            written.clear()
        groups[-1].append(copy)
        written.add(copy.dst)
    return groups


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy takes zeroed pages from the system as they are touched, where torch would write the whole cache at start-up.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
