"""Reads config.json of Llama, Mistral, Ministral 3, Qwen2, Qwen3, SmolLM3 and Seed-OSS, which `dense.py` computes. Torch-free."""

from __future__ import annotations

import msgspec

from engine.models import config_common as common
from engine.models import config_rope
from engine.models.config_reader import ConfigReader
from engine.models.spec import ModelSpec

ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Ministral3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
    "SeedOssForCausalLM",
)


def parse(c: ConfigReader, generation: ConfigReader | None) -> ModelSpec:
    """Read the ModelSpec of a dense model. Raises CheckpointError, naming the key."""
    architecture = common.architecture_of(c)
    common.refuse_unsupported(c)
    head_dim = common.head_dim(c)
    rope = config_rope.rope(c, head_dim)
    if architecture == "Ministral3ForCausalLM":
        rope = config_rope.query_scaling(c, rope)
    spec = common.base_spec(c, generation, num_kv_heads=common.num_kv_heads(c), head_dim=head_dim, rope=rope)
    qkv_bias, o_bias = _biases(c, architecture)
    return msgspec.structs.replace(
        spec,
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        qk_norm=architecture == "Qwen3ForCausalLM",
        nope_layers=_nope_layers(c) if architecture == "SmolLM3ForCausalLM" else (),
    )


def _biases(c: ConfigReader, architecture: str) -> tuple[bool, bool]:
    """Return whether q, k and v have biases, and whether o has one."""
    if architecture == "Qwen2ForCausalLM":
        c.flag("attention_bias", False)  # either value is idle: Qwen2 has biases on q, k and v in any case, and none on o
        return True, False
    if architecture == "SeedOssForCausalLM":
        return c.flag("attention_bias"), c.flag("attention_out_bias")
    if not c.has_default("attention_bias"):
        c.must_be("attention_bias", False, f"{architecture} has no biases")
        return False, False
    return c.flag("attention_bias"), c.flag("attention_bias")


def _nope_layers(c: ConfigReader) -> tuple[int, ...]:
    """List the layers without rotary embedding.

    The key `no_rope_layers` has a 1 for each layer *with* rotary embedding and a 0 for each layer without, whatever its name
    says. If the key is absent, every `no_rope_layer_interval`-th layer has no rotary embedding.
    """
    count, has_rope = common.num_layers(c), c.integers("no_rope_layers")
    if not has_rope:
        interval = c.integer("no_rope_layer_interval")
        has_rope = [int((i + 1) % interval != 0) for i in range(count)]
    if len(has_rope) < count or not set(has_rope) <= {0, 1}:
        c.refuse("no_rope_layers", f"it must be a list of 0 or 1 for each of the {count} layers")
    return tuple(i for i in range(count) if not has_rope[i])
