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

MIN_TRITON_BLOCK = 16  # tokens: the least a matrix unit multiplies with


def choose(device: torch.device, pools: list[PoolSpec], block_size: int) -> AttentionBackend:
    """For a layer with `pools`. Raises ConfigError for a block size that the device's kernels cannot do."""
    if device.type != "cuda":
        return TorchAttention()
    if block_size < MIN_TRITON_BLOCK or block_size & (block_size - 1):
        raise ConfigError(
            f"cache.block_size is {block_size}: on CUDA it must be a power of two of at least {MIN_TRITON_BLOCK}",
            param="cache.block_size",
        )
    odd = [p for p in pools if p.name != "latent" and p.shape[-1] & (p.shape[-1] - 1)]
    if odd:
        log.warning("no kernel for heads of %d numbers yet: attention runs in plain torch, which is slow", odd[0].shape[-1])
        return TorchAttention()
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    latent = any(p.name == "latent" for p in pools)
    kind = importlib.import_module("engine.attention.triton_paged").TritonAttention
    backend: AttentionBackend = kind(processors, latent=latent)
    return backend
