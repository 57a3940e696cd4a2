"""Reads config.json of DeepSeek-V2 and V3. Torch-free."""

from __future__ import annotations

import msgspec

from engine.layers.kinds import RopeSpec, RoutingSpec, TopkMethod
from engine.models import config_common as common
from engine.models.config_reader import ConfigReader
from engine.models.spec import MlaSpec, ModelSpec, MoeSpec

V2, V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"
ARCHITECTURES = (V2, V3)


def parse(c: ConfigReader, generation: ConfigReader | None) -> ModelSpec:
    """Read the ModelSpec of a DeepSeek model. Raises CheckpointError, naming the key."""
    architecture = common.architecture_of(c)
    v3 = architecture == V3
    common.refuse_unsupported(c)
    if c.flag("attention_bias", False):
        c.refuse("attention_bias", f"biases in the attention of {architecture} are not supported")
    nope, rope_dim = c.integer("qk_nope_head_dim"), c.integer("qk_rope_head_dim")
    rope = common.rope(c, rope_dim, interleaved=c.flag("rope_interleave", True) if v3 else True)
    spec = common.base_spec(c, generation, num_kv_heads=common.num_heads(c), head_dim=nope + rope_dim, rope=rope)
    return msgspec.structs.replace(
        spec,
        mla=_mla(c, rope),
        moe=_moe(c, v3=v3) if c.has("n_routed_experts") else None,
        num_mtp_layers=_mtp_layers(c) if v3 else 0,
    )


def _mla(c: ConfigReader, rope: RopeSpec) -> MlaSpec:
    nope, rope_dim = c.integer("qk_nope_head_dim"), c.integer("qk_rope_head_dim")
    scale = (nope + rope_dim) ** -0.5
    r = common.rope_section(c)
    if r is not None and r.data.get("mscale_all_dim"):
        if rope.scaling != "yarn":
            r.refuse("mscale_all_dim", "it is supported with rope type yarn only")
        scale *= common.yarn_mscale(rope.factor, r.number("mscale_all_dim")) ** 2
    return MlaSpec(
        q_lora_rank=c.integer("q_lora_rank") if c.has("q_lora_rank") else None,
        kv_lora_rank=c.integer("kv_lora_rank"),
        nope_dim=nope,
        rope_dim=rope_dim,
        v_dim=c.integer("v_head_dim"),
        softmax_scale=scale,
    )


def _mtp_layers(c: ConfigReader) -> int:
    key = "num_mtp_layers" if c.has("num_mtp_layers") else "num_nextn_predict_layers"
    return c.integer(key, 1, low=0, high=common.MAX_LAYERS)


def _moe(c: ConfigReader, *, v3: bool) -> MoeSpec:
    scoring = "sigmoid" if v3 else "softmax"
    c.choice("scoring_func", (scoring,), scoring)
    normalize = c.flag("norm_topk_prob", v3)
    if normalize and not v3:
        c.refuse("norm_topk_prob", "DeepSeek-V2's own code and transformers disagree about what it means; it must be false")
    size = c.integer("moe_intermediate_size")
    first, step = c.integer("first_k_dense_replace", 0, low=0), c.integer("moe_layer_freq", 1)
    layers = tuple(i for i in range(common.num_layers(c)) if i >= first and i % step == 0)
    return MoeSpec(
        routing=_routing(c, v3=v3, normalize=normalize),
        intermediate_size=size,
        shared_size=size * c.integer("n_shared_experts", 0, low=0, high=common.MAX_EXPERTS),
        layers=layers,
    )


def _routing(c: ConfigReader, *, v3: bool, normalize: bool) -> RoutingSpec:
    methods: dict[str, TopkMethod]
    methods = {"noaux_tc": "noaux_tc"} if v3 else {"greedy": "greedy", "group_limited_greedy": "group_limited_greedy"}
    method = methods[c.choice("topk_method", tuple(methods), next(iter(methods)))]
    grouped = method != "greedy"
    routing = RoutingSpec(
        num_experts=c.integer("n_routed_experts", high=common.MAX_EXPERTS),
        top_k=c.integer("num_experts_per_tok"),
        method=method,
        n_group=c.integer("n_group") if grouped else 1,
        topk_group=c.integer("topk_group") if grouped else 1,
        normalize=normalize,
        scale=c.number("routed_scaling_factor", 1.0),
    )
    common.check_routing(c, routing)
    return routing
