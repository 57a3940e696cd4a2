"""Which attention backend serves a model on a device. A backend's libraries are imported only once it is chosen."""

from __future__ import annotations

import importlib
import logging

import torch

from engine.attention.base import AttentionBackend
from engine.attention.torch_ref import TorchAttention
from engine.batch import PoolSpec
from engine.errors import ConfigError

log = logging.getLogger("tidegate.engine")

MIN_TRITON_BLOCK = 16  # tokens, or numbers of a head: the least a matrix unit multiplies with
MAX_HEAD_BYTES = 512


def _has_kernel(pool: PoolSpec) -> bool:
    """Powers of two, as much as a matrix unit takes, and for heads no more than fits into shared memory."""
    if not pool.parts and pool.shape[-1] * pool.dtype.itemsize > MAX_HEAD_BYTES:
        return False
    return all(size >= MIN_TRITON_BLOCK and not size & (size - 1) for size in pool.parts or pool.shape[-1:])


def choose(device: torch.device, pools: list[PoolSpec], block_size: int) -> AttentionBackend:
    """For a layer with `pools`. Raises ConfigError for a block size that the device's kernels cannot do."""
    if device.type != "cuda":
        return TorchAttention()
    if block_size < MIN_TRITON_BLOCK or block_size & (block_size - 1):
        raise ConfigError(
            f"cache.block_size is {block_size}: on CUDA it must be a power of two of at least {MIN_TRITON_BLOCK}",
            param="cache.block_size",
        )
    odd = [p for p in pools if not _has_kernel(p)]
    if odd:
        log.warning(
            "no kernel for heads or latents of %s numbers in %s yet: attention runs in plain torch, which is slow",
            " and ".join(map(str, odd[0].parts or odd[0].shape[-1:])),
            str(odd[0].dtype).removeprefix("torch."),
        )
        return TorchAttention()
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    latent = any(p.name == "latent" for p in pools)
    kind = importlib.import_module("engine.attention.triton_paged").TritonAttention
    backend: AttentionBackend = kind(processors, latent=latent)
    return backend
