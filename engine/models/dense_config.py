"""Reads config.json of the families in `dense.py`: Llama, Mistral, Qwen2, Qwen3 and SmolLM3. Torch-free."""

from __future__ import annotations

import msgspec

from engine.models import config_common as common
from engine.models.config_reader import ConfigReader
from engine.models.spec import ModelSpec

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
)

SMOLLM3_THETA = 2e6  # SmolLM3's default of rope_theta, which its files leave out
MISTRAL_WINDOW = 4096  # Mistral's default of sliding_window, which its files leave out


def parse(c: ConfigReader, generation: ConfigReader | None) -> ModelSpec:
    """Read the ModelSpec of a dense model. Raises CheckpointError, naming the key."""
    architecture = common.architecture_of(c)
    _refuse_unsupported(c, architecture)
    smollm3 = architecture == "SmolLM3ForCausalLM"
    # Qwen3's head_dim is not hidden_size / num_attention_heads, so its files must have it.
    head_dim = c.integer("head_dim") if architecture == "Qwen3ForCausalLM" else common.head_dim(c)
    spec = common.base_spec(
        c,
        generation,
        num_kv_heads=common.num_kv_heads(c),
        head_dim=head_dim,
        rope=common.rope(c, head_dim, default_theta=SMOLLM3_THETA if smollm3 else 1e4),
        tied=smollm3,
    )
    bias = c.flag("attention_bias", False)
    return msgspec.structs.replace(
        spec,
        qkv_bias=bias or architecture == "Qwen2ForCausalLM",
        o_bias=bias,
        qk_norm=architecture == "Qwen3ForCausalLM",
        nope_layers=_nope_layers(c) if smollm3 else (),
    )


def _refuse_unsupported(c: ConfigReader, architecture: str) -> None:
    common.refuse_unsupported(c)
    if architecture == "Qwen2ForCausalLM" and c.flag("attention_bias", False):
        c.refuse("attention_bias", "Qwen2 has biases on q, k and v in any case, and none on o")
    if architecture == "MistralForCausalLM":
        window = c.data.get("sliding_window", MISTRAL_WINDOW)
        if window is not None and (type(window) is not int or window < common.positions(c)):
            c.refuse("sliding_window", "sliding-window attention is not supported; null or max_position_embeddings is")
    elif architecture != "LlamaForCausalLM":
        common.refuse_window_switch(c)


def _nope_layers(c: ConfigReader) -> tuple[int, ...]:
    """List the layers without rotary embedding.

    The key `no_rope_layers` has a 1 for each layer *with* rotary embedding and a 0 for each layer without, whatever its name
    says. If the key is absent, every `no_rope_layer_interval`-th layer has no rotary embedding.
    """
    count, interval = common.num_layers(c), c.integer("no_rope_layer_interval", 4)
    has_rope = c.integers("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(count)]
    if len(has_rope) < count or not set(has_rope) <= {0, 1}:
        c.refuse("no_rope_layers", f"it must be a list of 0 or 1 for each of the {count} layers")
    return tuple(i for i in range(count) if not has_rope[i])
