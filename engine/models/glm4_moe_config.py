"""Reads config.json of GLM-4-MoE. Torch-free."""

from __future__ import annotations

import msgspec

from engine.models import config_common as common
from engine.models import config_rope
from engine.models.config_reader import ConfigReader
from engine.models.sigmoid_moe_config import layers_with_experts, sigmoid_moe
from engine.models.spec import ModelSpec

ARCHITECTURES = ("Glm4MoeForCausalLM",)


def parse(c: ConfigReader, generation: ConfigReader | None) -> ModelSpec:
    """Read the ModelSpec of a GLM-4-MoE model. Raises CheckpointError, naming the key."""
    common.refuse_unsupported(c)
    head_dim = common.head_dim(c)
    rope = config_rope.rope(c, head_dim, partial=True)
    spec = common.base_spec(c, generation, num_kv_heads=common.num_kv_heads(c), head_dim=head_dim, rope=rope)
    return msgspec.structs.replace(
        spec,
        qkv_bias=c.flag("attention_bias"),
        qk_norm=c.flag("use_qk_norm"),
        moe=sigmoid_moe(c, layers_with_experts(c)),
        num_mtp_layers=common.mtp_layers(c),
    )
