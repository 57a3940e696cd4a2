"""Reads config.json of MiniMax-M2. Torch-free."""

from __future__ import annotations

import msgspec

from engine.layers.kinds import RoutingSpec
from engine.models import config_common as common
from engine.models import config_rope
from engine.models.config_reader import ConfigReader
from engine.models.spec import ModelSpec, MoeSpec

ARCHITECTURES = ("MiniMaxM2ForCausalLM",)

# Keys of published files that have one value only, and what the model does.
ONLY = {
    "scoring_func": ("sigmoid", "the router's scores are a sigmoid"),
    "use_routing_bias": (True, "the router's choice has a bias"),
    "use_qk_norm": (True, "queries and keys are normed"),
    "qk_norm_type": ("per_layer", "queries are normed over all heads together, and so are keys"),
    "shared_intermediate_size": (0, "shared experts are not supported"),
    "layernorm_full_attention_beta": (1.0, "the residual stream is not scaled"),
    "layernorm_linear_attention_beta": (1.0, "the residual stream is not scaled"),
    "layernorm_mlp_beta": (1.0, "the residual stream is not scaled"),
    "attention_bias": (False, "this architecture has no biases"),
}


def parse(c: ConfigReader, generation: ConfigReader | None) -> ModelSpec:
    """Read the ModelSpec of a MiniMax-M2 model. Raises CheckpointError, naming the key."""
    common.refuse_unsupported(c)
    for key, (value, why) in ONLY.items():
        c.must_be(key, value, why)
    if set(c.integers("attn_type_list")) - {1}:
        c.refuse("attn_type_list", "linear attention is not supported; every entry must be 1")
    head_dim = common.head_dim(c)
    rope = config_rope.rope(c, head_dim, partial=True)
    spec = common.base_spec(c, generation, num_kv_heads=common.num_kv_heads(c), head_dim=head_dim, rope=rope)
    return msgspec.structs.replace(
        spec,
        qk_norm_all=True,
        moe=_moe(c),
        num_mtp_layers=common.mtp_layers(c, "num_mtp_modules") * c.integer("mtp_transformer_layers", 1, low=0, high=9),
    )


def _moe(c: ConfigReader) -> MoeSpec:
    """Read the experts. All layers have them, and their size is `intermediate_size`."""
    routing = RoutingSpec(
        num_experts=c.integer("num_local_experts", high=common.MAX_EXPERTS),
        top_k=c.integer("num_experts_per_tok"),
        method="noaux_tc",
        normalize=True,
    )
    common.check_routing(c, routing)
    layers = tuple(range(common.num_layers(c)))
    return MoeSpec(
        routing=routing, intermediate_size=c.integer("intermediate_size"), shared_size=0, layers=layers, float32_router=True
    )
