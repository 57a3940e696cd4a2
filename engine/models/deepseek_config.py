"""Reads config.json of DeepSeek-V2 and V3, and of GLM-4-MoE-Lite, which is V3 with other defaults. Torch-free."""

from __future__ import annotations

import msgspec

from engine.layers.kinds import RopeSpec, RoutingSpec, TopkMethod
from engine.models import config_common as common
from engine.models import config_rope
from engine.models.config_reader import ConfigReader
from engine.models.sigmoid_moe_config import layers_with_experts, shared_experts, sigmoid_moe
from engine.models.spec import MlaSpec, ModelSpec, MoeSpec

V2, V3, GLM_LITE = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM"
ARCHITECTURES = (V2, V3, GLM_LITE)


def parse(c: ConfigReader, generation: ConfigReader | None) -> ModelSpec:
    """Read the ModelSpec of a model with latent attention. Raises CheckpointError, naming the key."""
    architecture = common.architecture_of(c)
    common.refuse_unsupported(c)
    _check_heads(c, architecture)
    nope, rope_dim = c.integer("qk_nope_head_dim"), c.integer("qk_rope_head_dim")
    if architecture == V2:
        c.must_be("rope_interleave", True, "the rotary pairs of DeepSeek-V2 are interleaved")
    interleaved = architecture == V2 or c.flag("rope_interleave")
    rope = config_rope.rope(c, rope_dim, interleaved=interleaved)
    spec = common.base_spec(c, generation, num_kv_heads=common.num_heads(c), head_dim=nope + rope_dim, rope=rope)
    return msgspec.structs.replace(
        spec,
        mla=_mla(c, rope),
        moe=_moe(c, architecture) if c.has("n_routed_experts") else None,
        num_mtp_layers=0 if architecture == V2 else common.mtp_layers(c),
    )


def _check_heads(c: ConfigReader, architecture: str) -> None:
    """Refuse attention that is not latent attention as it is computed here."""
    if c.flag("attention_bias"):
        c.refuse("attention_bias", f"biases in the attention of {architecture} are not supported")
    if c.integer("num_key_value_heads", common.num_heads(c), high=common.MAX_HEADS) != common.num_heads(c):
        c.refuse("num_key_value_heads", "latent attention has as many key heads as query heads")
    size = c.integer("qk_nope_head_dim") + c.integer("qk_rope_head_dim")
    c.must_be("qk_head_dim", size, "it is qk_nope_head_dim + qk_rope_head_dim")


def _mla(c: ConfigReader, rope: RopeSpec) -> MlaSpec:
    nope, rope_dim = c.integer("qk_nope_head_dim"), c.integer("qk_rope_head_dim")
    scale = (nope + rope_dim) ** -0.5
    r = config_rope.rope_section(c)
    if r.get("mscale_all_dim"):
        if rope.scaling != "yarn":
            r.refuse("mscale_all_dim", "it is supported with rope type yarn only")
        scale *= config_rope.yarn_mscale(rope.factor, r.number("mscale_all_dim")) ** 2
    return MlaSpec(
        q_lora_rank=c.integer("q_lora_rank") if c.has("q_lora_rank") else None,
        kv_lora_rank=c.integer("kv_lora_rank"),
        nope_dim=nope,
        rope_dim=rope_dim,
        v_dim=c.integer("v_head_dim"),
        softmax_scale=scale,
    )


def _moe(c: ConfigReader, architecture: str) -> MoeSpec:
    if architecture == GLM_LITE:
        return sigmoid_moe(c, _sparse_layers(c))
    layers = layers_with_experts(c)
    return sigmoid_moe(c, layers) if architecture == V3 else _softmax_moe(c, layers)


def _sparse_layers(c: ConfigReader) -> tuple[int, ...]:
    """List the layers with experts of GLM-4-MoE-Lite: those that `mlp_layer_types` calls sparse, by default all but the first."""
    count = common.num_layers(c)
    kinds = c.words("mlp_layer_types", ("dense", "sparse")) or ["dense", *["sparse"] * (count - 1)]
    if len(kinds) != count:
        c.refuse("mlp_layer_types", f"it must have a word for each of the {count} layers")
    layers = tuple(i for i, kind in enumerate(kinds) if kind == "sparse")
    if c.has("first_k_dense_replace") and layers != tuple(range(c.integer("first_k_dense_replace", low=0), count)):
        c.refuse("first_k_dense_replace", "mlp_layer_types, or its default of one dense layer, says otherwise")
    c.must_be("moe_layer_freq", 1, "mlp_layer_types says which layers have experts")
    return layers


def _softmax_moe(c: ConfigReader, layers: tuple[int, ...]) -> MoeSpec:
    c.must_be("scoring_func", "softmax", "the router's scores are a softmax in DeepSeek-V2")
    if c.flag("norm_topk_prob"):
        c.refuse("norm_topk_prob", "DeepSeek-V2's own code and transformers disagree about what it means; it must be false")
    methods: dict[str, TopkMethod] = {"greedy": "greedy", "group_limited_greedy": "group_limited_greedy"}
    method = methods[c.choice("topk_method", tuple(methods))]
    routing = RoutingSpec(
        num_experts=c.integer("n_routed_experts", high=common.MAX_EXPERTS),
        top_k=c.integer("num_experts_per_tok"),
        method=method,
        n_group=1 if method == "greedy" else c.integer("n_group"),
        topk_group=1 if method == "greedy" else c.integer("topk_group"),
        scale=c.number("routed_scaling_factor"),
    )
    common.check_routing(c, routing)
    size = c.integer("moe_intermediate_size")
    return MoeSpec(
        routing=routing, intermediate_size=size, shared_size=size * shared_experts(c), layers=layers, float32_router=True
    )
