"""Reads the keys of config.json that several model families share. Torch-free.

Two spellings are accepted: rope_theta, rope_scaling and torch_dtype (transformers 4), or rope_parameters and dtype
(transformers 5). A key that asks for something the models here cannot compute is refused by its name.
"""

from __future__ import annotations

import math

import msgspec

from engine.layers.kinds import RopeSpec, RoutingSpec
from engine.models.config_reader import ConfigReader
from engine.models.spec import DTypeName, Fp8Spec, ModelSpec

# These limits are several times the sizes of the largest known model. ConfigReader limits all other sizes.
MAX_LAYERS = 1 << 10
MAX_HEADS = 1 << 12
MAX_EXPERTS = 1 << 14
MAX_VOCAB = 1 << 24
MAX_LEN = 1 << 25
MIN_THETA = 1.5  # YaRN divides by the logarithm of theta, so theta must be well above 1


def architecture_of(c: ConfigReader) -> str:
    """Return the one entry of `architectures`. Callers have checked that there is one."""
    return str(c.data["architectures"][0])


def base_spec(
    c: ConfigReader, generation: ConfigReader | None, *, num_kv_heads: int, head_dim: int, rope: RopeSpec, tied: bool = False
) -> ModelSpec:
    """Read the keys that mean the same in every family. A family adds its own fields with `msgspec.structs.replace`.

    `tied` is the family's default of tie_word_embeddings: files leave out a key that has its default. The end-of-sequence
    ids of generation_config.json are added to those of config.json.
    """
    vocab_size = c.integer("vocab_size", high=MAX_VOCAB)
    return ModelSpec(
        architecture=architecture_of(c),
        vocab_size=vocab_size,
        hidden_size=c.integer("hidden_size"),
        intermediate_size=c.integer("intermediate_size"),
        num_layers=num_layers(c),
        num_heads=num_heads(c),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=c.number("rms_norm_eps"),
        max_model_len=_max_model_len(c, rope),
        dtype=_dtype(c),
        eos_token_ids=_eos(c, generation, vocab_size),
        rope=rope,
        tie_embeddings=c.flag("tie_word_embeddings", tied),
        fp8=_fp8(c),
    )


def refuse_unsupported(c: ConfigReader) -> None:
    """Refuse the settings of config.json that no model family here can compute. Raises CheckpointError, naming the key."""
    c.choice("hidden_act", ("silu",))
    if c.flag("mlp_bias", False):
        c.refuse("mlp_bias", "biases in the MLP are not supported")
    _refuse_partial_rotary(c)
    kinds = c.data.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        c.refuse("layer_types", "only full_attention layers are supported")


def refuse_window_switch(c: ConfigReader) -> None:
    """Refuse sliding windows for a family that has `use_sliding_window` to turn them on."""
    if c.flag("use_sliding_window", False) and c.has("sliding_window"):
        c.refuse("use_sliding_window", "sliding-window attention is not supported; it must be false")


def num_layers(c: ConfigReader) -> int:
    return c.integer("num_hidden_layers", high=MAX_LAYERS)


def num_heads(c: ConfigReader) -> int:
    return c.integer("num_attention_heads", high=MAX_HEADS)


def num_kv_heads(c: ConfigReader) -> int:
    heads = num_heads(c)
    kv_heads = c.integer("num_key_value_heads", heads, high=MAX_HEADS)
    if heads % kv_heads:
        c.refuse("num_key_value_heads", f"it must divide num_attention_heads ({heads})")
    return kv_heads


def head_dim(c: ConfigReader) -> int:
    """Read `head_dim`. If the key is absent, return hidden_size / num_attention_heads."""
    heads, hidden = num_heads(c), c.integer("hidden_size")
    if not c.has("head_dim") and hidden % heads:
        c.refuse("head_dim", f"without it, num_attention_heads ({heads}) must divide hidden_size ({hidden})")
    return c.integer("head_dim", hidden // heads)


def positions(c: ConfigReader) -> int:
    return c.integer("max_position_embeddings", high=MAX_LEN)


def rope_section(c: ConfigReader) -> ConfigReader | None:
    return c.section("rope_scaling") or c.section("rope_parameters")


def rope(c: ConfigReader, dim: int, *, interleaved: bool = False, default_theta: float = 1e4) -> RopeSpec:
    """Read the rotary embedding over `dim` numbers of a head, with the scaling that the rope section asks for."""
    if dim % 2:
        c.refuse("qk_rope_head_dim" if c.has("qk_rope_head_dim") else "head_dim", "rotary embedding needs an even number")
    if not interleaved and c.flag("rope_interleave", False):
        c.refuse("rope_interleave", "interleaved rotary pairs are supported for multi-head latent attention only")
    r = rope_section(c) or ConfigReader({}, c.source, "rope_parameters.")
    if any(isinstance(value, dict) for value in r.data.values()):
        c.refuse(r.path.rstrip("."), "rotary embeddings that differ between layers are not supported")
    _refuse_partial_rotary(r)
    theta = (r if r.has("rope_theta") else c).number("rope_theta", default_theta, low=MIN_THETA)
    kind = r.choice("rope_type" if r.has("rope_type") else "type", ("default", "linear", "llama3", "yarn"), "default")
    plain = RopeSpec(theta=theta, dim=dim, interleaved=interleaved)
    if kind == "default":
        return plain
    if kind == "linear":
        return msgspec.structs.replace(plain, scaling="linear", factor=r.number("factor"))
    original = r.integer("original_max_position_embeddings", positions(c), high=MAX_LEN)
    return _yarn(c, r, plain, original) if kind == "yarn" else _llama3(r, plain, original)


def yarn_mscale(factor: float, mscale: float) -> float:
    """Compute how much YaRN sharpens attention for a context that is stretched `factor` times (YaRN paper, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def check_routing(c: ConfigReader, routing: RoutingSpec) -> None:
    """Refuse group and top_k settings that leave a token without enough experts to choose from."""
    if routing.num_experts % routing.n_group:
        c.refuse("n_group", f"it must divide the number of experts ({routing.num_experts})")
    if routing.topk_group > routing.n_group:
        c.refuse("topk_group", f"it must be at most n_group ({routing.n_group})")
    if routing.method == "noaux_tc" and routing.num_experts // routing.n_group < 2:
        c.refuse("n_group", f"with {routing.num_experts} experts a group has fewer than the two that give its score")
    selectable = routing.num_experts // routing.n_group * routing.topk_group
    if routing.top_k > selectable:
        c.refuse("num_experts_per_tok", f"it must be at most {selectable}, the experts that a token can choose from")


def _refuse_partial_rotary(section: ConfigReader) -> None:
    if section.data.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        section.refuse("partial_rotary_factor", "rotary embedding over a part of each head is not supported")


def _llama3(r: ConfigReader, plain: RopeSpec, original: int) -> RopeSpec:
    low, high = r.number("low_freq_factor"), r.number("high_freq_factor")
    if low >= high:
        r.refuse("low_freq_factor", f"it must be below high_freq_factor ({high})")
    return msgspec.structs.replace(
        plain, scaling="llama3", factor=r.number("factor"), original_max_len=original, low_freq_factor=low, high_freq_factor=high
    )


def _yarn(c: ConfigReader, r: ConfigReader, plain: RopeSpec, original: int) -> RopeSpec:
    factor = r.number("factor", positions(c) / original)
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


def _max_model_len(c: ConfigReader, rope: RopeSpec) -> int:
    length = positions(c)
    # Some checkpoints turn YaRN on and leave max_position_embeddings at the length they were trained for.
    return max(length, int(rope.original_max_len * rope.factor)) if rope.scaling == "yarn" else length


def _dtype(c: ConfigReader) -> DTypeName:
    key = "dtype" if c.has("dtype") else "torch_dtype"
    names: dict[str, DTypeName] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
    return names[c.choice(key, tuple(names), "float32")]


def _eos(c: ConfigReader, generation: ConfigReader | None, vocab_size: int) -> tuple[int, ...]:
    sources = [c] if generation is None else [c, generation]
    return tuple(dict.fromkeys(i for s in sources for i in s.token_ids("eos_token_id", vocab_size)))


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
