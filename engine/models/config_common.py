"""Reads the keys of config.json that several model families share. Torch-free.

A key that asks for something the models here cannot compute is refused by its name.
"""

from __future__ import annotations

from engine.layers.kinds import RopeSpec, RoutingSpec
from engine.models.config_reader import ConfigReader
from engine.models.config_rope import positions
from engine.models.formats import read_quantization
from engine.models.spec import DTypeName, ModelSpec

# These limits are several times the sizes of the largest known model. ConfigReader limits all other sizes.
MAX_LAYERS = 1 << 10
MAX_HEADS = 1 << 12
MAX_EXPERTS = 1 << 14
MAX_VOCAB = 1 << 24


def architecture_of(c: ConfigReader) -> str:
    """Return the one entry of `architectures`. Callers have checked that there is one."""
    return str(c.get("architectures")[0])


def base_spec(c: ConfigReader, generation: ConfigReader | None, *, num_kv_heads: int, head_dim: int, rope: RopeSpec) -> ModelSpec:
    """Read the keys that mean the same in every family. A family adds its own fields with `msgspec.structs.replace`.

    The end-of-sequence ids of generation_config.json are added to those of config.json.
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
        sliding_window=_sliding_window(c),
        dtype=_dtype(c),
        eos_token_ids=_eos(c, generation, vocab_size),
        rope=rope,
        tie_embeddings=c.flag("tie_word_embeddings"),
        fp8=read_quantization(c),
    )


def refuse_unsupported(c: ConfigReader) -> None:
    """Refuse the settings of config.json that no model family here can compute. Raises CheckpointError, naming the key."""
    c.choice("hidden_act", ("silu", "swish"))  # two names of one function
    if c.flag("mlp_bias", False):
        c.refuse("mlp_bias", "biases in the MLP are not supported")
    if c.has("dual_chunk_attention_config"):
        c.note("dual_chunk_attention_config has no effect: attention is exact over the whole context, as in transformers")


def num_layers(c: ConfigReader) -> int:
    return c.integer("num_hidden_layers", high=MAX_LAYERS)


def num_heads(c: ConfigReader) -> int:
    return c.integer("num_attention_heads", high=MAX_HEADS)


def num_kv_heads(c: ConfigReader) -> int:
    """Read `num_key_value_heads`. Null means as many as queries have."""
    heads = num_heads(c)
    kv_heads = c.integer("num_key_value_heads", heads, high=MAX_HEADS)
    if heads % kv_heads:
        c.refuse("num_key_value_heads", f"it must divide num_attention_heads ({heads})")
    return kv_heads


def head_dim(c: ConfigReader) -> int:
    """Read `head_dim`. Null, or absence in a family without a default of it, means hidden_size / num_attention_heads."""
    heads, hidden = num_heads(c), c.integer("hidden_size")
    if not c.has("head_dim") and hidden % heads:
        c.refuse("head_dim", f"without it, num_attention_heads ({heads}) must divide hidden_size ({hidden})")
    return c.integer("head_dim", hidden // heads)


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


def mtp_layers(c: ConfigReader, key: str = "num_nextn_predict_layers") -> int:
    """Read how many multi-token prediction layers the checkpoint may hold."""
    return c.integer(key, 0, low=0, high=MAX_LAYERS)


def _sliding_window(c: ConfigReader) -> int | None:
    """Return how many tokens the layers with a sliding window attend to, or None if there are no such layers.

    A window in a family that has none is treated as one, so that it is accepted only where it changes nothing.
    """
    kinds = c.words("layer_types", ("full_attention", "sliding_attention"))
    if kinds and len(kinds) != num_layers(c):
        c.refuse("layer_types", f"it must have a word for each of the {num_layers(c)} layers")
    slides = "sliding_attention" in kinds
    if c.has("use_sliding_window") and not c.flag("use_sliding_window"):
        if slides:
            c.refuse("layer_types", "use_sliding_window is false, so it must not name sliding_attention")
        return None
    if not c.has("sliding_window"):
        if slides:
            c.refuse("layer_types", "sliding_attention needs sliding_window, which is not set")
        return None
    window = c.integer("sliding_window", high=MAX_VOCAB)
    if c.has_default("layer_types") and c.has("layer_types"):
        return window if slides else None
    return None if c.has_default("max_window_layers") and c.integer("max_window_layers", low=0) >= num_layers(c) else window


def _max_model_len(c: ConfigReader, rope: RopeSpec) -> int:
    """Return the longest context. YaRN may stretch it beyond max_position_embeddings, which some files leave as it was."""
    length = positions(c)
    stretched = int(rope.original_max_len * rope.factor) if rope.scaling == "yarn" else 0
    if stretched > length:
        c.note(f"the context has {stretched} tokens, to which YaRN stretches it, and not max_position_embeddings ({length})")
    return max(length, stretched)


def _dtype(c: ConfigReader) -> DTypeName:
    old, new = c.get("torch_dtype"), c.get("dtype")
    if old is not None and new not in (None, old):
        c.note(f"torch_dtype {old} has no effect: dtype is {new}")
    key = "dtype" if new is not None else "torch_dtype"
    names: dict[str, DTypeName] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
    return names[c.choice(key, tuple(names), "float32")]


def _eos(c: ConfigReader, generation: ConfigReader | None, vocab_size: int) -> tuple[int, ...]:
    found = []
    for source in [c] if generation is None else [c, generation]:
        ids = source.token_ids("eos_token_id")
        if absent := [i for i in ids if not 0 <= i < vocab_size]:
            c.notes.append(f"{source.source}: eos_token_id {absent} ends nothing: the vocabulary has {vocab_size} tokens")
        found += [i for i in ids if i not in absent]
    return tuple(dict.fromkeys(found))
