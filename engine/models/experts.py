"""Makes the MLP of a layer: dense, or a mixture of experts as the ModelSpec describes it."""

from __future__ import annotations

import torch

from engine.layers.mlp import GatedMlp
from engine.layers.moe import MoeMlp
from engine.models.base import Mlp
from engine.models.spec import ModelSpec


def make_mlp(spec: ModelSpec, index: int, *, dtype: torch.dtype, device: torch.device, experts: type[MoeMlp] = MoeMlp) -> Mlp:
    """Make the MLP of layer `index`, with experts of the class `experts` if the spec gives it some.

    Multi-token prediction layers (from num_layers on) have experts if the model has any.
    """
    moe = spec.moe
    if moe is None or (index < spec.num_layers and index not in moe.layers):
        return GatedMlp(spec.hidden_size, spec.intermediate_size, dtype=dtype, device=device)
    return experts(
        moe.routing,
        spec.hidden_size,
        moe.intermediate_size,
        shared_size=moe.shared_size,
        # The scores of two experts may differ by little, so that rounding could choose another expert.
        router_dtype=torch.float32 if moe.float32_router else dtype,
        dtype=dtype,
        device=device,
    )
