"""ModelSpec: what a checkpoint is, read once from its folder. Torch-free, and the only place that looks at Hugging Face keys.

Both ways of writing are read: rope_theta + rope_scaling, torch_dtype (transformers 4) and rope_parameters, dtype
(transformers 5). What the models here cannot compute is refused by name rather than ignored.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.config import ModelLimits
from engine.errors import CheckpointError
from engine.layers.kinds import RopeSpec, RoutingSpec
from engine.models.config_reader import ConfigReader, read_json

DTypeName = Literal["float32", "bfloat16", "float16"]

# Several times the largest model there is; sizes without a line here have ConfigReader's own limit.
MAX_LAYERS = 1 << 10
MAX_HEADS = 1 << 12
MAX_EXPERTS = 1 << 14
MAX_VOCAB = 1 << 24
MAX_LEN = 1 << 25
MIN_THETA = 1.5  # below: the frequencies' base, whose logarithm YaRN divides by

Family = Literal["dense", "qwen3_moe", "deepseek"]
ARCHITECTURES: dict[str, Family] = {  # family: the file in this folder that computes it
    "LlamaForCausalLM": "dense",
    "MistralForCausalLM": "dense",
    "Qwen2ForCausalLM": "dense",
    "Qwen3ForCausalLM": "dense",
    "SmolLM3ForCausalLM": "dense",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "DeepseekV2ForCausalLM": "deepseek",
    "DeepseekV3ForCausalLM": "deepseek",
}


class MlaSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Multi-head latent attention: keys and values are projections of one cached latent of kv_lora_rank + rope_dim numbers."""

    q_lora_rank: int | None  # None: queries are projected in one step
    kv_lora_rank: int
    nope_dim: int  # of a query or key head: the part without, and
    rope_dim: int  # the part with rotary embedding
    v_dim: int
    softmax_scale: float


class MoeSpec(msgspec.Struct, frozen=True, kw_only=True):
    routing: RoutingSpec
    intermediate_size: int  # of one expert
    shared_size: int  # intermediate size of the shared experts together; 0: none
    layers: tuple[int, ...]  # which layers are of experts; the others are dense


class Fp8Spec(msgspec.Struct, frozen=True, kw_only=True):
    """Weights stored as e4m3 with one float32 scale for each block of `block` [rows, columns]."""

    block: tuple[int, int]


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_model_len: int
    dtype: DTypeName
    eos_token_ids: tuple[int, ...]
    rope: RopeSpec
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    nope_layers: tuple[int, ...] = ()  # layers without rotary embedding
    mla: MlaSpec | None = None
    moe: MoeSpec | None = None
    fp8: Fp8Spec | None = None
    num_mtp_layers: int = 0  # layers past num_layers that the checkpoint may hold, for multi-token prediction

    @staticmethod
    def from_folder(folder: str | Path) -> ModelSpec:
        """Read `config.json`, and end-of-sequence ids also from `generation_config.json` where there is one."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; give the folder that holds the model's config.json", param="model")
        generation = folder / "generation_config.json"
        return _parse(read_json(folder / "config.json"), read_json(generation) if generation.exists() else None)

    @staticmethod
    def from_hf(config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelSpec:
        """The same from the parsed files."""
        extra = None if generation is None else ConfigReader(generation, "generation_config.json")
        return _parse(ConfigReader(config, "config.json"), extra)

    def limits(self) -> ModelLimits:
        return ModelLimits(
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            dtype=self.dtype,
        )


def _parse(c: ConfigReader, generation: ConfigReader | None) -> ModelSpec:
    architecture = _architecture(c)
    _refuse_unsupported(c, architecture)
    mla_family = architecture.startswith("Deepseek")
    heads = c.integer("num_attention_heads", high=MAX_HEADS)
    kv_heads = heads if mla_family else c.integer("num_key_value_heads", heads, high=MAX_HEADS)
    if heads % kv_heads:
        c.refuse("num_key_value_heads", f"it must divide num_attention_heads ({heads})")
    head_dim = _mla_head_dim(c) if mla_family else _head_dim(c, architecture, heads)
    qwen2, smollm3 = architecture == "Qwen2ForCausalLM", architecture == "SmolLM3ForCausalLM"
    rope = _rope(
        c,
        c.integer("qk_rope_head_dim") if mla_family else head_dim,
        interleaved=_interleaved(c, architecture),
        default_theta=2e6 if smollm3 else 1e4,
    )
    attention_bias = c.flag("attention_bias", False)
    vocab_size = c.integer("vocab_size", high=MAX_VOCAB)
    return ModelSpec(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=c.integer("hidden_size"),
        intermediate_size=c.integer("intermediate_size"),
        num_layers=_num_layers(c),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=c.number("rms_norm_eps"),
        max_model_len=_max_model_len(c, rope),
        dtype=_dtype(c),
        eos_token_ids=_eos(c, generation, vocab_size),
        rope=rope,
        tie_embeddings=c.flag("tie_word_embeddings", smollm3),  # files leave out what is the family's default
        qkv_bias=qwen2 or attention_bias,
        o_bias=attention_bias,
        qk_norm=architecture.startswith("Qwen3"),
        nope_layers=_nope_layers(c) if smollm3 else (),
        mla=_mla(c, rope) if mla_family else None,
        moe=_moe(c, architecture),
        fp8=_fp8(c),
        num_mtp_layers=_mtp_layers(c, architecture),
    )


def _architecture(c: ConfigReader) -> str:
    names = c.data.get("architectures")
    if names not in [[name] for name in ARCHITECTURES]:
        c.refuse("architectures", f"it must be a list of one of: {', '.join(ARCHITECTURES)}")
    return str(names[0])


def _refuse_unsupported(c: ConfigReader, architecture: str) -> None:
    c.choice("hidden_act", ("silu",))
    if c.flag("mlp_bias", False):
        c.refuse("mlp_bias", "biases in the MLP are not supported")
    if architecture.startswith("Deepseek") and c.flag("attention_bias", False):
        c.refuse("attention_bias", f"biases in the attention of {architecture} are not supported")
    if architecture == "Qwen2ForCausalLM" and c.flag("attention_bias", False):
        c.refuse("attention_bias", "Qwen2 has biases on q, k and v in any case, and none on o")
    if c.data.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        c.refuse("partial_rotary_factor", "rotary embedding over a part of each head is not supported")
    kinds = c.data.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        c.refuse("layer_types", "only full_attention layers are supported")
    if architecture == "MistralForCausalLM":
        window = c.data.get("sliding_window", 4096)  # the family's default where the key is absent
        if window is not None and (type(window) is not int or window < _positions(c)):
            c.refuse("sliding_window", "sliding-window attention is not supported; null or max_position_embeddings is")
    elif architecture.startswith(("Qwen", "SmolLM3")) and c.flag("use_sliding_window", False) and c.has("sliding_window"):
        c.refuse("use_sliding_window", "sliding-window attention is not supported; it must be false")


def _nope_layers(c: ConfigReader) -> tuple[int, ...]:
    """`no_rope_layers` has, whatever its name says, a 1 for each layer with rotary embedding and a 0 for each without.

    Where it is missing, each `no_rope_layer_interval`-th layer is without.
    """
    count, interval = _num_layers(c), c.integer("no_rope_layer_interval", 4)
    has_rope = c.integers("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(count)]
    if len(has_rope) < count or not set(has_rope) <= {0, 1}:
        c.refuse("no_rope_layers", f"it must be a list of 0 or 1 for each of the {count} layers")
    return tuple(i for i in range(count) if not has_rope[i])


def _head_dim(c: ConfigReader, architecture: str, heads: int) -> int:
    if architecture == "Qwen3ForCausalLM":
        return c.integer("head_dim")  # the family's head_dim is not hidden_size / heads
    hidden = c.integer("hidden_size")
    if not c.has("head_dim") and hidden % heads:
        c.refuse("head_dim", f"without it, num_attention_heads ({heads}) must divide hidden_size ({hidden})")
    return c.integer("head_dim", hidden // heads)


def _mla_head_dim(c: ConfigReader) -> int:
    return c.integer("qk_nope_head_dim") + c.integer("qk_rope_head_dim")


def _interleaved(c: ConfigReader, architecture: str) -> bool:
    if architecture == "DeepseekV3ForCausalLM":
        return c.flag("rope_interleave", True)
    return architecture == "DeepseekV2ForCausalLM"


def _rope(c: ConfigReader, dim: int, *, interleaved: bool, default_theta: float) -> RopeSpec:
    if dim % 2:
        c.refuse("qk_rope_head_dim" if c.has("qk_rope_head_dim") else "head_dim", "rotary embedding needs an even number")
    r = c.section("rope_scaling") or c.section("rope_parameters") or ConfigReader({}, c.source, "rope_parameters.")
    if any(isinstance(value, dict) for value in r.data.values()):
        c.refuse(r.path.rstrip("."), "rotary embeddings that differ between layers are not supported")
    if r.data.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        r.refuse("partial_rotary_factor", "rotary embedding over a part of each head is not supported")
    theta = (r if r.has("rope_theta") else c).number("rope_theta", default_theta, low=MIN_THETA)
    kind = r.choice("rope_type" if r.has("rope_type") else "type", ("default", "linear", "llama3", "yarn"), "default")
    plain = RopeSpec(theta=theta, dim=dim, interleaved=interleaved)
    if kind == "default":
        return plain
    if kind == "linear":
        return msgspec.structs.replace(plain, scaling="linear", factor=r.number("factor"))
    original = r.integer("original_max_position_embeddings", _positions(c), high=MAX_LEN)
    if kind == "yarn":
        return _yarn(c, r, plain, original)
    low, high = r.number("low_freq_factor"), r.number("high_freq_factor")
    if low >= high:
        r.refuse("low_freq_factor", f"it must be below high_freq_factor ({high})")
    return msgspec.structs.replace(
        plain, scaling="llama3", factor=r.number("factor"), original_max_len=original, low_freq_factor=low, high_freq_factor=high
    )


def _yarn(c: ConfigReader, r: ConfigReader, plain: RopeSpec, original: int) -> RopeSpec:
    factor = r.number("factor", _positions(c) / original)
    if original * factor > MAX_LEN:
        r.refuse("factor", f"times {original} positions it must be at most {MAX_LEN}")
    if r.has("attention_factor"):
        magnitude = r.number("attention_factor")
    elif r.data.get("mscale") and r.data.get("mscale_all_dim"):
        magnitude = yarn_mscale(factor, r.number("mscale")) / yarn_mscale(factor, r.number("mscale_all_dim"))
    else:
        magnitude = yarn_mscale(factor, 1.0)
    return msgspec.structs.replace(
        plain,
        scaling="yarn",
        factor=factor,
        original_max_len=original,
        beta_fast=r.number("beta_fast", 32.0),
        beta_slow=r.number("beta_slow", 1.0),
        truncate=r.flag("truncate", True),
        magnitude=magnitude,
    )


def yarn_mscale(factor: float, mscale: float) -> float:
    """How much attention is sharpened for a context stretched `factor` times (YaRN, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _num_layers(c: ConfigReader) -> int:
    return c.integer("num_hidden_layers", high=MAX_LAYERS)


def _positions(c: ConfigReader) -> int:
    return c.integer("max_position_embeddings", high=MAX_LEN)


def _max_model_len(c: ConfigReader, rope: RopeSpec) -> int:
    length = _positions(c)
    # Some checkpoints turn YaRN on beside the length they were trained for.
    return max(length, int(rope.original_max_len * rope.factor)) if rope.scaling == "yarn" else length


def _dtype(c: ConfigReader) -> DTypeName:
    key = "dtype" if c.has("dtype") else "torch_dtype"
    names: dict[str, DTypeName] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
    return names[c.choice(key, tuple(names), "float32")]


def _eos(c: ConfigReader, generation: ConfigReader | None, vocab_size: int) -> tuple[int, ...]:
    sources = [c] if generation is None else [c, generation]
    return tuple(dict.fromkeys(i for s in sources for i in s.token_ids("eos_token_id", vocab_size)))


def _mla(c: ConfigReader, rope: RopeSpec) -> MlaSpec:
    nope, rope_dim = c.integer("qk_nope_head_dim"), c.integer("qk_rope_head_dim")
    scale = (nope + rope_dim) ** -0.5
    r = c.section("rope_scaling") or c.section("rope_parameters")
    if r is not None and r.data.get("mscale_all_dim"):
        if rope.scaling != "yarn":
            r.refuse("mscale_all_dim", "it is supported with rope type yarn only")
        scale *= yarn_mscale(rope.factor, r.number("mscale_all_dim")) ** 2
    return MlaSpec(
        q_lora_rank=c.integer("q_lora_rank") if c.has("q_lora_rank") else None,
        kv_lora_rank=c.integer("kv_lora_rank"),
        nope_dim=nope,
        rope_dim=rope_dim,
        v_dim=c.integer("v_head_dim"),
        softmax_scale=scale,
    )


def _mtp_layers(c: ConfigReader, architecture: str) -> int:
    if architecture != "DeepseekV3ForCausalLM":
        return 0
    return c.integer("num_mtp_layers" if c.has("num_mtp_layers") else "num_nextn_predict_layers", 1, low=0, high=MAX_LAYERS)


def _moe(c: ConfigReader, architecture: str) -> MoeSpec | None:
    if architecture == "Qwen3MoeForCausalLM":
        return _qwen3_moe(c)
    if architecture.startswith("Deepseek") and c.has("n_routed_experts"):
        return _deepseek_moe(c, architecture)
    return None


def _qwen3_moe(c: ConfigReader) -> MoeSpec:
    count = "num_experts" if c.has("num_experts") else "num_local_experts"
    step, dense = c.integer("decoder_sparse_step", 1), c.integers("mlp_only_layers")
    routing = RoutingSpec(
        num_experts=c.integer(count, high=MAX_EXPERTS),
        top_k=c.integer("num_experts_per_tok"),
        normalize=c.flag("norm_topk_prob", False),
    )
    _check_top_k(c, routing)
    layers = tuple(i for i in range(_num_layers(c)) if i not in dense and (i + 1) % step == 0)
    return MoeSpec(routing=routing, intermediate_size=c.integer("moe_intermediate_size"), shared_size=0, layers=layers)


def _deepseek_moe(c: ConfigReader, architecture: str) -> MoeSpec:
    v3 = architecture == "DeepseekV3ForCausalLM"
    c.choice("scoring_func", ("sigmoid" if v3 else "softmax",), "sigmoid" if v3 else "softmax")
    normalize = c.flag("norm_topk_prob", v3)
    if normalize and not v3:
        c.refuse("norm_topk_prob", "DeepSeek-V2 checkpoints with it are read in two ways by their own code and transformers")
    size, first, step = (
        c.integer("moe_intermediate_size"),
        c.integer("first_k_dense_replace", 0, low=0),
        c.integer("moe_layer_freq", 1),
    )
    layers = tuple(i for i in range(_num_layers(c)) if i >= first and i % step == 0)
    return MoeSpec(
        routing=_deepseek_routing(c, v3=v3, normalize=normalize),
        intermediate_size=size,
        shared_size=size * c.integer("n_shared_experts", 0, low=0, high=MAX_EXPERTS),
        layers=layers,
    )


def _deepseek_routing(c: ConfigReader, *, v3: bool, normalize: bool) -> RoutingSpec:
    allowed = ("noaux_tc",) if v3 else ("greedy", "group_limited_greedy")
    method = c.choice("topk_method", allowed, allowed[0])
    grouped = method != "greedy"
    routing = RoutingSpec(
        num_experts=c.integer("n_routed_experts", high=MAX_EXPERTS),
        top_k=c.integer("num_experts_per_tok"),
        method=method,  # type: ignore[arg-type]
        n_group=c.integer("n_group") if grouped else 1,
        topk_group=c.integer("topk_group") if grouped else 1,
        normalize=normalize,
        scale=c.number("routed_scaling_factor", 1.0),
    )
    _check_top_k(c, routing)
    return routing


def _check_top_k(c: ConfigReader, r: RoutingSpec) -> None:
    if r.num_experts % r.n_group:
        c.refuse("n_group", f"it must divide the number of experts ({r.num_experts})")
    if r.topk_group > r.n_group:
        c.refuse("topk_group", f"it must be at most n_group ({r.n_group})")
    if r.method == "noaux_tc" and r.num_experts // r.n_group < 2:
        c.refuse("n_group", f"with {r.num_experts} experts a group has fewer than the two that it is judged by")
    open_experts = r.num_experts // r.n_group * r.topk_group
    if r.top_k > open_experts:
        c.refuse("num_experts_per_tok", f"it must be at most {open_experts}, the experts that a token can choose from")


def _fp8(c: ConfigReader) -> Fp8Spec | None:
    q = c.section("quantization_config")
    if q is None:
        return None
    q.choice("quant_method", ("fp8",))
    q.choice("fmt", ("e4m3",), "e4m3")
    q.choice("activation_scheme", ("dynamic",), "dynamic")
    block = q.data.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        q.refuse("weight_block_size", "it must be [rows, columns] of a block, such as [128, 128]")
    return Fp8Spec(block=(block[0], block[1]))
