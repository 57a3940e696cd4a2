"""Defines the device tensors of one step, and copies host arrays to a device.

ForwardBatch goes from the runner to every layer as an argument. A query is one slice of the plan. With T tokens, B queries
and S sampled positions in the step:

    tokens      q0 | q1 | q2 | q3 q3 q3 q3 | q4 q4          num_decodes = 3, T = 9, B = 5
    query_starts  0    1    2    3             7     9      [B + 1]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

LayerPools = dict[str, torch.Tensor]
"""The per-token pools of a layer by name, each [num_blocks, block_size, *shape]: K and V, an MLA latent, indexer keys, scales."""

HOST = "host "
"""A layer of a spilled step has each pool twice: "host k" is pool "k" in the host tier, [num_slots, block_size, *shape]."""

Upload = Callable[[Sequence[npt.NDArray[Any]]], list[torch.Tensor]]
"""Copies host arrays to the device without waiting for the device. An `Uploader` is one."""

_ALIGN = 16  # bytes; every array of one upload begins on a multiple, where an array of any dtype may begin


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """The description of one KV pool of a layer: its name, and the shape and dtype of one token's record.

    `parts` are the sizes of the vectors in a record, if a record consists of several vectors.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[int, ...] = ()


def block_bytes(pools: Iterable[Sequence[PoolSpec]], block_size: int) -> int:
    """Return the bytes of one KV block, summed over all layers and pools."""
    return block_size * sum(math.prod(pool.shape) * pool.dtype.itemsize for layer in pools for pool in layer)


class WarmupChunk(NamedTuple):
    """A prefill chunk whose kind is slow the first time: `num` tokens, behind a context of `cached` tokens."""

    num: int
    cached: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """The tensors of one step, of T tokens in B queries.

    `by_length` marks a mixed step captured in a CUDA graph. Its lengths change from replay to replay, and only the device knows
    them: `query_starts` alone tells decodes (one token each) from chunks, `num_decodes` is 0, and the lists on the host are
    empty.

    A spilled step has one query, whose first blocks lie in the host tier. Only `attention/spilled.py` serves it.
    """

    token_ids: torch.Tensor  # [T] int64: id of each token
    positions: torch.Tensor  # [T] int64: position of each token in its sequence
    slots: torch.Tensor  # [T] int64: block * block_size + offset, where each token's KV is written
    query_starts: torch.Tensor  # [B + 1] int32: index of each query's first token among the T tokens
    kv_lens: torch.Tensor  # [B] int32: tokens in the KV cache once this step's tokens are written
    block_tables: torch.Tensor  # [B, max_blocks] int32: KV blocks; entries past a row's own blocks are meaningless
    num_decodes: int  # the first num_decodes queries have one token each
    query_lens_host: list[int]  # [B]: tokens of each query, for attention that loops on the host
    kv_lens_host: list[int]  # [B]: `kv_lens` on the host, unless the step is captured in a CUDA graph
    kv: list[LayerPools]  # the KV pools of each layer
    by_length: bool = False
    read: Read | None = None  # None: the hidden states of all tokens are read
    spilled: torch.Tensor | None = None  # [n] int64, on the CPU: slots with the first n blocks; `block_tables` has the others

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def num_queries(self) -> int:
        return int(self.kv_lens.shape[0])

    def last_tokens(
        self, index: torch.Tensor, kv_lens: torch.Tensor, block_tables: torch.Tensor, kv_lens_host: list[int]
    ) -> Read:
        """Select the last tokens of S queries as the tokens whose hidden states are read.

        index [S] int64 holds the index of each of these tokens among the step's tokens. kv_lens [S] int32, block_tables [S,
        max_blocks] int32 and kv_lens_host [S] belong to the same queries.
        """
        num, device = index.shape[0], index.device
        return Read(
            index,
            ForwardBatch(
                token_ids=self.token_ids.index_select(0, index),
                positions=self.positions.index_select(0, index),
                slots=self.slots.index_select(0, index),
                query_starts=torch.arange(num + 1, dtype=torch.int32, device=device),
                kv_lens=kv_lens,
                block_tables=block_tables,
                num_decodes=num,
                query_lens_host=[1] * num,
                kv_lens_host=kv_lens_host,
                kv=self.kv,
                spilled=self.spilled,
            ),
        )


@dataclass(frozen=True, slots=True)
class Read:
    """The S tokens of a step whose hidden states are read after the last layer.

    For all other tokens the last layer only writes the KV.
    """

    index: torch.Tensor  # [S] int64: index of each of these tokens among the step's tokens
    batch: ForwardBatch  # these tokens alone, each as a decode of a token that is in the KV cache already


class Uploader:
    """Copies host arrays to a device. On CUDA, all arrays of one call go in a single transfer, and the host does not wait.

    Every array of a call begins on 16 bytes, which Triton's compiled kernels rely on (`kernels/launch.py`).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, arrays: Sequence[npt.NDArray[Any]]) -> list[torch.Tensor]:
        if self._device.type != "cuda":
            return [torch.from_numpy(a).to(self._device) for a in arrays]
        ends = np.cumsum([-(-a.nbytes // _ALIGN) * _ALIGN for a in arrays]).tolist()
        staging = pinned(ends[-1], torch.uint8)
        flat = staging.numpy()
        begins = [0, *ends[:-1]]
        for begin, a in zip(begins, arrays, strict=True):
            flat[begin : begin + a.nbytes] = a.reshape(-1).view(np.uint8)
        there = staging.to(self._device, non_blocking=True)
        return [_view(there[begin : begin + a.nbytes], a) for begin, a in zip(begins, arrays, strict=True)]


def pinned(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Allocate an uninitialised tensor [size] in page-locked host memory, so that the host need not wait for copies to a device.

    torch caches such memory, and gives a buffer out again only once the copies from the buffer are done.
    """
    return torch.empty(size, dtype=dtype, pin_memory=True)


def _view(data: torch.Tensor, like: npt.NDArray[Any]) -> torch.Tensor:
    return data.view(torch.from_numpy(np.empty(0, like.dtype)).dtype).view(like.shape)
