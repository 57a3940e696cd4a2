"""Family of architectures -> the class that computes it."""

from __future__ import annotations

import torch

from engine.attention.base import AttentionBackend
from engine.attention.torch_ref import TorchAttention
from engine.errors import CheckpointError
from engine.models.base import DecoderModel as Model
from engine.models.deepseek import DeepseekModel
from engine.models.dense import DenseModel
from engine.models.qwen3_moe import Qwen3MoeModel
from engine.models.spec import ARCHITECTURES, Family, ModelSpec

__all__ = ["MODELS", "Model", "build"]

MODELS: dict[Family, type[Model]] = {
    "dense": DenseModel,
    "qwen3_moe": Qwen3MoeModel,
    "deepseek": DeepseekModel,
}


def build(spec: ModelSpec, *, dtype: torch.dtype, device: torch.device, attention: AttentionBackend | None = None) -> Model:
    """The model of `spec` with its weights allocated on `device` but not filled."""
    family = ARCHITECTURES.get(spec.architecture)
    if family is None:
        raise CheckpointError(f"no model computes {spec.architecture}; there is: {', '.join(ARCHITECTURES)}", param="model")
    return MODELS[family](spec, dtype=dtype, device=device, backend=attention or TorchAttention())
