"""Maps each model family to the class that computes it, and builds models and multi-token prediction modules."""

from __future__ import annotations

from typing import Any

import torch

from engine.errors import CheckpointError
from engine.models.base import DecoderModel
from engine.models.deepseek import DeepseekModel
from engine.models.deepseek_mtp import DeepseekMtp
from engine.models.dense import DenseModel
from engine.models.families import ARCHITECTURES, Family
from engine.models.glm4_moe import Glm4MoeModel
from engine.models.minimax_m2 import MiniMaxM2Model
from engine.models.qwen3_moe import Qwen3MoeModel
from engine.models.spec import ModelSpec

__all__ = ["MODELS", "Model", "build", "build_mtp"]

Model = DecoderModel[Any]

MODELS: dict[Family, type[Model]] = {
    "dense": DenseModel,
    "qwen3_moe": Qwen3MoeModel,
    "glm4_moe": Glm4MoeModel,
    "minimax_m2": MiniMaxM2Model,
    "deepseek": DeepseekModel,
}


def build(spec: ModelSpec, *, dtype: torch.dtype, device: torch.device) -> Model:
    """Build the model of `spec`, with plain torch attention and with its weights allocated on `device` but not filled.

    Raises CheckpointError for an architecture that no family serves.
    """
    family = ARCHITECTURES.get(spec.architecture)
    if family is None:
        raise CheckpointError(f"{spec.architecture} is not supported; supported are: {', '.join(ARCHITECTURES)}", param="model")
    return MODELS[family](spec, dtype=dtype, device=device)


def build_mtp(model: Model) -> DeepseekMtp:
    """Build the first multi-token prediction module of `model`, with its weights allocated but not filled.

    It shares the embedding, head and attention of `model`. Raises CheckpointError if the architecture has no such module.
    """
    is_v3 = model.spec.architecture == "DeepseekV3ForCausalLM"
    if not isinstance(model, DeepseekModel) or not is_v3 or not model.spec.num_mtp_layers:
        raise CheckpointError(
            f"{model.spec.architecture} has no multi-token prediction module; only DeepseekV3ForCausalLM has one, if "
            "num_nextn_predict_layers in config.json is at least 1",
            param="model",
        )
    return DeepseekMtp(model)
