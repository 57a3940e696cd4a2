"""Family of architectures -> the class that computes it, and the part of it that guesses a token further ahead."""

from __future__ import annotations

import torch

from engine.attention.base import AttentionBackend
from engine.attention.torch_ref import TorchAttention
from engine.errors import CheckpointError
from engine.models.base import DecoderModel as Model
from engine.models.deepseek import DeepseekModel
from engine.models.deepseek_mtp import DeepseekMtp
from engine.models.dense import DenseModel
from engine.models.families import ARCHITECTURES, Family
from engine.models.qwen3_moe import Qwen3MoeModel
from engine.models.spec import ModelSpec

__all__ = ["MODELS", "Model", "build", "build_mtp"]

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


def build_mtp(model: Model) -> DeepseekMtp:
    """The first multi-token prediction module that goes with `model`, allocated beside it but not filled.

    It takes embedding, head and attention backend of `model` as they are now. Raises CheckpointError where there is none.
    """
    if not isinstance(model, DeepseekModel) or not model.spec.num_mtp_layers:
        raise CheckpointError(
            f"{model.spec.architecture} has no multi-token prediction here: it takes DeepseekV3ForCausalLM "
            "with num_nextn_predict_layers 1 in config.json",
            param="model",
        )
    return DeepseekMtp(model)
