"""Chooses the attention implementation for a model's KV pools and a device. Triton is imported only if it is chosen."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from engine.attention.base import PagedAttention
from engine.attention.spilled import SpilledGqa, SpilledMla
from engine.attention.torch_gqa import TorchGqa
from engine.attention.torch_mla import TorchMla
from engine.batch import PoolSpec
from engine.errors import ConfigError, InternalError
from engine.kernels.hardware import is_gpu, processors

log = logging.getLogger("tidegate.engine")

MIN_TRITON_BLOCK = 16  # fewest tokens of a KV block, and fewest numbers of a head: the smallest tile of a tensor core
MAX_HEAD_BYTES = 512  # most bytes of one head's K or V of a token: larger tiles do not fit into shared memory


class _Kind(NamedTuple):
    """The implementations of one kind of attention: plain torch, plain torch over a spilled context, and Triton."""

    plain: Callable[[], PagedAttention[Any]]
    spilled: Callable[[], PagedAttention[Any]]
    triton: tuple[str, str]  # module and class; the class is constructed with the number of multiprocessors


_KINDS = {
    frozenset({"k", "v"}): _Kind(TorchGqa, SpilledGqa, ("engine.attention.triton_gqa", "TritonGqa")),
    frozenset({"latent"}): _Kind(TorchMla, SpilledMla, ("engine.attention.triton_mla", "TritonMla")),
}


def plain(pools: list[PoolSpec]) -> PagedAttention[Any]:
    """Make the plain torch implementation for layers with KV pools `pools`. It runs on any device."""
    return _kind(pools).plain()


def spilled(pools: list[PoolSpec]) -> PagedAttention[Any]:
    """Make the implementation for steps whose context lies in the host tier in part. It runs on any device."""
    return _kind(pools).spilled()


def choose(device: torch.device, pools: list[PoolSpec], block_size: int) -> PagedAttention[Any]:
    """Make the fastest implementation for layers with KV pools `pools` on `device`.

    Raises ConfigError for a block size that the device's kernels do not support.
    """
    if not is_gpu(device):
        return plain(pools)
    if block_size < MIN_TRITON_BLOCK or block_size & (block_size - 1):
        raise ConfigError(
            f"cache.block_size is {block_size}: on CUDA it must be a power of two of at least {MIN_TRITON_BLOCK}",
            param="cache.block_size",
        )
    unsupported = [pool for pool in pools if not _has_kernel(pool)]
    if unsupported:
        log.warning(
            "no attention kernel for heads or latents of %s numbers in %s: attention runs in plain torch, which is slow",
            " and ".join(map(str, unsupported[0].parts or unsupported[0].shape[-1:])),
            str(unsupported[0].dtype).removeprefix("torch."),
        )
        return plain(pools)
    module, name = _kind(pools).triton
    attention: PagedAttention[Any] = getattr(importlib.import_module(module), name)(processors(device))
    return attention


def _kind(pools: list[PoolSpec]) -> _Kind:
    names = frozenset(pool.name for pool in pools)
    if names not in _KINDS:
        known = " or ".join(str(sorted(kind)) for kind in _KINDS)
        raise InternalError(f"no attention for a layer with the pools {sorted(names)}: there is one for {known}")
    return _KINDS[names]


def _has_kernel(pool: PoolSpec) -> bool:
    """Whether the Triton kernels support the KV pool's vectors: powers of two of at least 16 numbers, and at most 512 bytes a
    head."""
    if not pool.parts and pool.shape[-1] * pool.dtype.itemsize > MAX_HEAD_BYTES:
        return False
    return all(size >= MIN_TRITON_BLOCK and not size & (size - 1) for size in pool.parts or pool.shape[-1:])
