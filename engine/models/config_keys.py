"""Judges the keys of a config.json that no family's reader has looked up. Torch-free.

One rule, for every key: what changes a number is computed or refused by its name, and what is neither known here nor looks as
if it changed a number is reported in the log.

    read by the family's reader                  computed, or refused there
    the family's own, but not read here          reported: another key makes it idle
    in HARMLESS or HARMLESS_IN                   accepted; the table gives the reason
    says in other words what is computed         accepted (`stated`); refused if its value says otherwise
    named after a part of the computation        refused, unless its value asks for nothing
    in an object that is read (rope_parameters)  refused: each key of such an object is a setting of one computation
    any other                                    reported by its name: people add keys of their own to files daily
"""

from __future__ import annotations

import re
from typing import Any

from engine.models.config_reader import ConfigReader
from engine.models.spec import ModelSpec

# Keys that are harmless in every architecture, by the reason.
_REASONS: dict[str, str] = {
    "it is read in training only": """
        initializer_range attention_dropout hidden_dropout hidden_dropout_prob resid_pdrop attn_pdrop embd_pdrop residual_dropout
        classifier_dropout router_aux_loss_coef aux_loss_alpha seq_aux router_jitter_noise neftune_noise_alpha init_std
        gradient_checkpointing use_gradient_checkpointing z_loss_coefficient router_z_loss_coef initializer_factor
        initializer_cutoff_factor layerdrop mtp_loss_scaling_factor""",
    "it records where the file comes from or what wrote it": """
        _name_or_path name_or_path model_type architectures transformers_version auto_map _commit_hash unsloth_fixed
        unsloth_version transformers.js_config is_llama_config task_specific_params tokenizer_class model_name finetuning_task""",
    "it chooses what transformers returns, not what is computed": """
        use_cache output_attentions _output_attentions output_hidden_states return_dict use_return_dict torchscript
        return_dict_in_generate output_scores output_router_logits tie_last_hidden_states cache_implementation""",
    "it chooses among implementations of the same computation": """
        _attn_implementation attn_implementation _attn_implementation_autoset _attn_implementation_internal
        _flash_attn_2_enabled use_flash_attn use_flash_attention use_flash_attention_2 _experts_implementation
        experts_implementation chunk_size_feed_forward ep_size tf_legacy_loss use_bfloat16""",
    "it cuts matrix products into slices, whose results are the same": "pretraining_tp",
    "it is a default of generation, which generation_config.json has": """
        max_length min_length max_new_tokens min_new_tokens do_sample early_stopping num_beams num_beam_groups
        diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
        encoder_no_repeat_ngram_size bad_words_ids num_return_sequences exponential_decay_length_penalty suppress_tokens
        begin_suppress_tokens remove_invalid_values forced_bos_token_id forced_eos_token_id""",
    "special tokens are the tokenizer's": """
        bos_token_id pad_token_id sep_token_id unk_token_id mask_token_id decoder_start_token_id""",
    "it belongs to a classifier's head": "id2label label2id num_labels problem_type",
    "the epsilon of the norms is rms_norm_eps": "layer_norm_eps",
    "it is read only with the scalings that need it, llama3 and yarn": "original_max_position_embeddings",
    "the context is max_position_embeddings": "max_sequence_length model_max_length seq_length",
    "only families that have it read it; in the others a window is that of all layers": "max_window_layers",
}
HARMLESS: dict[str, str] = {key: reason for reason, keys in _REASONS.items() for key in keys.split()}

_WINDOWS = {"sliding_window": "it is read only if use_sliding_window is true"}
_DEEPSEEK = {"head_dim": "the sizes of latent attention have keys of their own"}

# Keys that are harmless in some architectures only, with the reason.
HARMLESS_IN: dict[str, dict[str, str]] = {
    "Qwen2ForCausalLM": _WINDOWS,
    "Qwen3ForCausalLM": _WINDOWS,
    "Qwen3MoeForCausalLM": {
        **_WINDOWS,
        "shared_expert_intermediate_size": "this architecture has no shared expert",
    },
    "SmolLM3ForCausalLM": {
        **_WINDOWS,
        "no_rope_layer_interval": "it is read only if no_rope_layers is absent",
    },
    "DeepseekV2ForCausalLM": {
        **_DEEPSEEK,
        "n_group": "topk_method greedy has no groups",
        "topk_group": "topk_method greedy has no groups",
    },
    "DeepseekV3ForCausalLM": _DEEPSEEK,
    "MiniMaxM2ForCausalLM": {
        "mlp_intermediate_size": "all layers have experts, whose size is intermediate_size",
        "shared_moe_mode": "shared_intermediate_size is 0, so there is no shared expert",
        "use_mtp": "multi-token prediction layers are not used",
    },
}

# Keys of the objects that are read, by the object's name.
HARMLESS_INSIDE: dict[str, dict[str, str]] = {
    "rope": {
        "mrope_section": "a text's tokens have the same position on all three axes",
        "mrope_interleaved": "a text's tokens have the same position on all three axes",
        "finetuned": "it records how the model was trained",
        "max_position_embeddings": "the context is max_position_embeddings at the top level",
    },
    "quantization_config": {
        "modules_to_not_convert": "the type of each tensor is read from the file",
        "ignored_layers": "the type of each tensor is read from the file",
        "scale_fmt": "scales are numbers in the file, however they were rounded",
        "dequantize": "it chooses among implementations of the same computation",
    },
}

# A key whose name has one of these words is taken to change the computation.
_PARTS = re.compile(
    r"scal|multipl|soft_?cap|(^|_)(cap|act|mup|ln|fn|glu|ssm)(_|$)|bias|norm|(^|_)m?rope|rotary|alibi|(^|_)position|window|sliding"
    r"|sink|clip|clamp|residual|activation|(^|_)gat(e|ed|ing)(_|$)|qk|query|head(s|_|$)|attn|attention|causal|bidirect|interleave"
    r"|logit|embed|mlp|ffn|expert|moe|rout(e|ing)|(^|_)layers?(_|$)|hidden|hybrid|mamba|(^|_)conv(_|\d|$)|swiglu|chunk"
    r"|parallel_residual|softmax|index_(top|n_)|altup|laurel|dim_model_base"
)
_FACTOR = re.compile(r"scal|multipl|factor")
_ALWAYS = re.compile(r"causal|use_(rope|rotary|position)")  # a setting that is on in all architectures here
_FUSED = re.compile(r"(^|_)fused?(_|$)")  # a setting that chooses among implementations of the same computation


def stated(spec: ModelSpec) -> dict[str, tuple[Any, ...]]:
    """List keys, most of them of other architectures, that may say once more what a model of `spec` computes, and the values
    that say so."""
    facts: dict[str, tuple[Any, ...]] = {
        "use_qk_norm qk_norm": (spec.qk_norm or spec.qk_norm_all,),
        "qkv_bias use_qkv_bias add_qkv_bias attention_qkv_bias attn_qkv_bias": (spec.qkv_bias,),
        "activation activation_function activation_type hidden_activation mlp_activation act_fn": ("silu", "swish", "swiglu"),
        "norm_type normalization normalization_type layernorm_type": ("rmsnorm", "rms_norm", "RMSNorm"),
        "position_embedding_type position_encoding_type pos_emb": ("rope", "rotary"),
        "num_layers n_layers n_layer": (spec.num_layers,),
        "num_heads n_heads n_head": (spec.num_heads,),
        "num_kv_heads n_kv_heads num_query_groups multi_query_group_num": (spec.num_kv_heads,),
        "ffn_hidden_size ffn_dim": (spec.intermediate_size,),
        "norm_eps norm_epsilon layer_norm_epsilon layernorm_epsilon": (spec.norm_eps,),
    }
    return {key: values for keys, values in facts.items() for key in keys.split()}


def judge(c: ConfigReader, architecture: str, known: dict[str, tuple[Any, ...]] | None = None) -> list[str]:
    """Judge all keys of `c` and of the objects in it that nothing has read. Returns what the log has to say.

    `known` is the result of `stated`.

    Raises CheckpointError, naming the key, for one that changes a number.
    """
    for name, section in c.sections.items():
        _judge_section(section, "rope" if name.startswith("rope") else name)
    harmless = HARMLESS | HARMLESS_IN.get(architecture, {})
    unknown = [key for key in c.unread() if key not in harmless and not _is_stated(c.given[key], (known or {}).get(key, ()))]
    for key in unknown:
        if not c.has_default(key) and _PARTS.search(key.lower()) and not _asks_for_nothing(key, c.given[key]):
            c.refuse(
                key,
                f"its name says that it changes the computation, and {architecture} has no such key; remove it from the file if "
                "the model was trained without it",
            )
    if unknown:
        c.note(f"these keys have no effect here: {', '.join(c.path + key for key in sorted(unknown))}")
    return [*(note for section in c.sections.values() for note in section.notes), *c.notes]


def _judge_section(section: ConfigReader, name: str) -> None:
    for key in section.unread():
        if key in HARMLESS_INSIDE.get(name, {}):
            continue
        value = section.given[key]
        if not (value is False or key == "original_max_position_embeddings" or (key == "factor" and value == 1)):
            where = section.path.rstrip(".")
            section.refuse(key, f"it is no setting of this {where}; remove it if the model was trained without it")
        section.note(f"this key has no effect here: {section.path}{key}")


def _is_stated(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether `value` is one of `values`. The integers 0 and 1 are not the flags false and true."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values)


def _asks_for_nothing(key: str, value: Any) -> bool:
    """Whether `value` asks for what is done without the unknown setting `key`: false, 0 or empty, and for a factor false or 1."""
    if _FUSED.search(key.lower()):
        return isinstance(value, bool)
    if _ALWAYS.search(key.lower()):
        return value is True
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value == (1 if _FACTOR.search(key.lower()) else 0)
    return value in ("", [], {})
