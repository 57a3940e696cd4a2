"""KVStorage holds the tensors of the KV cache, any set of pools for each layer, and copies blocks within these pools.

KVStorage only carries out the copies of a plan. `manager.py` decides which request owns a block.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from engine.batch import LayerPools, PoolSpec, Upload
from engine.plan import BlockCopy, Place


class KVStorage:
    """Holds the KV cache of `num_blocks` blocks. `layers[i]` has layer i's pools by name.

    A pool is a tensor [num_blocks + 1, block_size, *shape], zeros at first.

    The last block, `scratch_block`, belongs to no request. The scratch row, which pads batches, writes there.
    """

    def __init__(self, pools: list[list[PoolSpec]], *, num_blocks: int, block_size: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.scratch_block = num_blocks
        self.layers: list[LayerPools] = [
            {p.name: _zeros((num_blocks + 1, block_size, *p.shape), p.dtype, device) for p in layer} for layer in pools
        ]

    def copy(self, copies: list[BlockCopy], upload: Upload) -> None:
        """Copy GPU blocks in all pools of all layers. The result is the same as if one copy followed the other."""
        for group in _independent(copies):
            src, dst = upload([np.array([place.number for place in places], np.int64) for places in zip(*group, strict=True)])
            for layer in self.layers:
                for pool in layer.values():
                    pool.index_copy_(0, dst, pool.index_select(0, src))


def _independent(copies: list[BlockCopy]) -> list[list[BlockCopy]]:
    """Divide `copies` into groups whose copies may run at the same time, and keep their order.

    A new group begins at a copy that reads or overwrites a block that an earlier copy of the same group wrote.
    """
    groups: list[list[BlockCopy]] = []
    written: set[Place] = set()
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
    # numpy takes zeroed pages from the system as they are touched. torch would write the whole cache at start.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
