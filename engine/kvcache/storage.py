"""KVStorage holds the tensors of the KV cache, any set of pools for each layer, and copies blocks within these pools.

KVStorage only carries out copies. `manager.py` decides which request owns a block.
"""

from __future__ import annotations

import math
from itertools import accumulate

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
        self._table = _PoolTable(self.layers)
        self.word = self._table.word
        self.record_words = self._table.num_words
        self.record_bytes = self.record_words * self.word.itemsize

    def pack(self, blocks: torch.Tensor, out: torch.Tensor) -> None:
        """Write the records of blocks [N] int64 to `out` [N, record_words]. A record has all pools of a block, layer by layer."""
        for rows, begin, end in self._table.rows:
            out[:, begin:end] = rows.index_select(0, blocks)

    def unpack(self, records: torch.Tensor, blocks: torch.Tensor) -> None:
        """Write records [N, record_words], as `pack` makes them, to the pools of the different blocks [N] int64."""
        for rows, begin, end in self._table.rows:
            rows.index_copy_(0, blocks, records[:, begin:end])

    def views(self, records: torch.Tensor) -> list[LayerPools]:
        """View records [N, record_words], as `pack` makes them, as each layer's pools [N, block_size, *shape]."""
        pools = [(i, name, pool) for i, layer in enumerate(self.layers) for name, pool in layer.items()]
        found: list[LayerPools] = [{} for _ in self.layers]
        for (i, name, pool), (_, begin, end) in zip(pools, self._table.rows, strict=True):
            found[i][name] = records[:, begin:end].view(pool.dtype).view(-1, *pool.shape[1:])
        return found

    def copy(self, copies: list[BlockCopy], upload: Upload) -> None:
        """Copy GPU blocks in all pools of all layers. The result is the same as if one copy followed the other."""
        for group in _independent(copies):
            src, dst = upload([np.array([place.number for place in places], np.int64) for places in zip(*group, strict=True)])
            for layer in self.layers:
                for pool in layer.values():
                    pool.index_copy_(0, dst, pool.index_select(0, src))


class _PoolTable:
    """Where the pools of all layers lie, as matrices [blocks, words], and where in a record each begins and ends.

    A word is the largest integer of which every pool's part of a block is a multiple.
    """

    def __init__(self, layers: list[LayerPools]) -> None:
        pools = [pool.flatten(1) for layer in layers for pool in layer.values()]
        sizes = [pool.shape[1] * pool.element_size() for pool in pools]
        size = math.gcd(8, *sizes)
        self.word = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[size]
        ends = list(accumulate(bytes_of_pool // size for bytes_of_pool in sizes))
        self.num_words = ends[-1] if ends else 0
        self.rows = list(zip((pool.view(self.word) for pool in pools), [0, *ends], ends, strict=False))


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
