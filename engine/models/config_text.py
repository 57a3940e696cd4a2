"""Finds the text model in the config.json of a model that also sees images. Only the text model is served. Torch-free."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from engine.models.config_reader import ConfigReader

# The model types of texts inside, and the architecture that computes them. A text's tokens have the same position on all axes of
# Qwen-VL's rotary embedding, so that text is a Qwen2 or a Qwen3.
TEXT_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_vl": "Qwen2ForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen2_5_vl": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
}
_QWEN2_VL = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_window_layers": 80,
    "rope_theta": 1e6,
}
# Defaults of a text inside that are not those of its architecture.
TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"), _QWEN2_VL),
    "qwen3_vl_text": {"max_position_embeddings": 128000, "rope_theta": 5e5},
}
# Architectures whose text is served, and whether the head is the embedding by default.
WRAPPERS = {
    "LlavaForConditionalGeneration": False,
    "Mistral3ForConditionalGeneration": True,
    "Qwen2VLForConditionalGeneration": False,
    "Qwen2_5_VLForConditionalGeneration": False,
    "Qwen3VLForConditionalGeneration": False,
}
_INHERITED = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config", "eos_token_id")
_OTHER_PARTS = re.compile(r"(vision|image|video|audio|projector|multimodal|mm|spatial)(_|$).*")


class TextPart(NamedTuple):
    config: ConfigReader  # the text model's own config
    model_type: str
    outer: ConfigReader | None  # the keys around it, without those of other parts; None if the two share one object


def text_part(c: ConfigReader) -> TextPart:
    """Find the text model in `c`. Raises CheckpointError, naming the key, if it is not supported.

    Older files of Qwen-VL have the text's keys at the top level.
    """
    wrapper = str(c.get("architectures")[0])
    inner = c.section("text_config")
    c.sections.clear()
    outer = {key: value for key, value in c.given.items() if key != "text_config" and not _OTHER_PARTS.fullmatch(key)}
    if inner is None:
        text, path, inherited = dict(outer), c.path, frozenset[str]()
    else:
        text, path = {key: outer[key] for key in _INHERITED if outer.get(key) is not None} | inner.given, inner.path
        inherited = frozenset(_INHERITED) - inner.given.keys()
    text_type = text.get("model_type")
    if text_type not in TEXT_TYPES:
        (inner or c).refuse("model_type", f"the text model must be one of: {', '.join(TEXT_TYPES)}")
    # Which of the two objects counts differs between versions of transformers. A head in the file is used in any case.
    stated = outer.get("tie_word_embeddings")
    tied = text.get("tie_word_embeddings") is True or (WRAPPERS[wrapper] if stated is None else stated)
    text |= {"tie_word_embeddings": tied, "architectures": [TEXT_TYPES[text_type]]}
    reader = ConfigReader(text, c.source, path, inherited=inherited)
    reader.note(f"only the text model of {wrapper} is served; images are not")
    # Some versions of transformers wrote the text's keys outside, too, where nothing reads them.
    twice = (
        {} if inner is None else {key: outer[key] for key in outer.keys() & inner.given.keys() - {"model_type", "architectures"}}
    )
    if idle := sorted(key for key in twice.keys() - set(_INHERITED) if twice[key] != text[key]):
        reader.note(f"these keys have no effect, since text_config has others: {', '.join(idle)}")
    around = {key: value for key, value in outer.items() if key not in _INHERITED and key not in twice}
    return TextPart(reader, str(text_type), None if inner is None else ConfigReader(around, c.source, c.path))
