"""Copies small host tensors to the device, for attention that plans a step on the host."""

from __future__ import annotations

import torch


def upload(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy the tensor `host` to `device`. On CUDA the copy goes through pinned memory, so that the host does not wait for it."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
