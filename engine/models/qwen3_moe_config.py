"""Reads config.json of Qwen3-MoE. Torch-free."""

from __future__ import annotations

import msgspec

from engine.layers.kinds import RoutingSpec
from engine.models import config_common as common
from engine.models.config_reader import ConfigReader
from engine.models.spec import ModelSpec, MoeSpec

ARCHITECTURES = ("Qwen3MoeForCausalLM",)


def parse(c: ConfigReader, generation: ConfigReader | None) -> ModelSpec:
    """Read the ModelSpec of a Qwen3-MoE model. Raises CheckpointError, naming the key."""
    common.refuse_unsupported(c)
    common.refuse_window_switch(c)
    head_dim = common.head_dim(c)
    spec = common.base_spec(c, generation, num_kv_heads=common.num_kv_heads(c), head_dim=head_dim, rope=common.rope(c, head_dim))
    bias = c.flag("attention_bias", False)
    return msgspec.structs.replace(spec, qkv_bias=bias, o_bias=bias, qk_norm=True, moe=_moe(c))


def _moe(c: ConfigReader) -> MoeSpec:
    count = "num_experts" if c.has("num_experts") else "num_local_experts"
    step, dense = c.integer("decoder_sparse_step", 1), c.integers("mlp_only_layers")
    routing = RoutingSpec(
        num_experts=c.integer(count, high=common.MAX_EXPERTS),
        top_k=c.integer("num_experts_per_tok"),
        normalize=c.flag("norm_topk_prob", False),
    )
    common.check_routing(c, routing)
    layers = tuple(i for i in range(common.num_layers(c)) if i not in dense and (i + 1) % step == 0)
    return MoeSpec(routing=routing, intermediate_size=c.integer("moe_intermediate_size"), shared_size=0, layers=layers)
