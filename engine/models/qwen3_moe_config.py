"""Reads config.json of Qwen3-MoE. Torch-free."""

from __future__ import annotations

import msgspec

from engine.layers.kinds import RoutingSpec
from engine.models import config_common as common
from engine.models import config_rope
from engine.models.config_reader import ConfigReader
from engine.models.spec import ModelSpec, MoeSpec

ARCHITECTURES = ("Qwen3MoeForCausalLM",)


def parse(c: ConfigReader, generation: ConfigReader | None) -> ModelSpec:
    """Read the ModelSpec of a Qwen3-MoE model. Raises CheckpointError, naming the key."""
    common.refuse_unsupported(c)
    head_dim = common.head_dim(c)
    rope = config_rope.rope(c, head_dim)
    spec = common.base_spec(c, generation, num_kv_heads=common.num_kv_heads(c), head_dim=head_dim, rope=rope)
    bias = c.flag("attention_bias")
    return msgspec.structs.replace(spec, qkv_bias=bias, o_bias=bias, qk_norm=True, moe=_moe(c))


def _moe(c: ConfigReader) -> MoeSpec:
    step, dense = c.integer("decoder_sparse_step"), c.integers("mlp_only_layers")
    routing = RoutingSpec(
        num_experts=c.integer("num_experts", high=common.MAX_EXPERTS),
        top_k=c.integer("num_experts_per_tok"),
        normalize=c.flag("norm_topk_prob"),
    )
    common.check_routing(c, routing)
    layers = tuple(i for i in range(common.num_layers(c)) if i not in dense and (i + 1) % step == 0)
    return MoeSpec(routing=routing, intermediate_size=c.integer("moe_intermediate_size"), shared_size=0, layers=layers)
