"""Tiny checkpoints of every family, and edits of them that published checkpoints have. Both sides score one prompt.

`theirs` is transformers' answer to an edited folder, and `ours` is Tidegate's: log-probabilities, or the refusal.
"""

from __future__ import annotations

import json
import logging.handlers
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from paged import PagedRun
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from engine.config import EngineConfig, ModelLimits, resolve
from engine.errors import TidegateError
from engine.models import registry
from engine.models.families import parse_spec, read_spec
from engine.weights import loader

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

VOCAB = 97
TOKENS = torch.randint(2, VOCAB, (72,), generator=torch.Generator().manual_seed(5)).tolist()
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
HEADS = SIZES | {"head_dim": 16}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = SIZES | EXPERTS | {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "n_routed_experts": 8}
LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SIZES),
    "mistral": ("MistralForCausalLM", HEADS | {"sliding_window": None}),
    "ministral3": ("Ministral3ForCausalLM", HEADS),
    "qwen2": ("Qwen2ForCausalLM", SIZES),
    "qwen3": ("Qwen3ForCausalLM", HEADS),
    "smollm3": ("SmolLM3ForCausalLM", SIZES | {"tie_word_embeddings": False, "no_rope_layers": [1, 0]}),
    "seed_oss": ("SeedOssForCausalLM", HEADS),
    "qwen3_moe": ("Qwen3MoeForCausalLM", HEADS | EXPERTS | {"num_experts": 8, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "glm4_moe": ("Glm4MoeForCausalLM", HEADS | EXPERTS | {"n_routed_experts": 8, "n_group": 2, "routed_scaling_factor": 1.5}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", HEADS | {"num_local_experts": 8, "num_experts_per_tok": 2, "rotary_dim": 8}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", LATENT | {"topk_method": "group_limited_greedy", "first_k_dense_replace": 1}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", LATENT | {"first_k_dense_replace": 1, "routed_scaling_factor": 2.0}),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", LATENT),
}

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]


class Ours(NamedTuple):
    """Tidegate's answer: log-probabilities, limits, and what the log says of the checkpoint, or an error."""

    logprobs: torch.Tensor | None
    limits: ModelLimits | None
    notes: str
    error: TidegateError | None


def make(family: str, folder: Path) -> Path:
    """Write the tiny checkpoint of `family`, with weights that are large enough for a strict comparison."""
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, name)(AutoConfig.for_model(family, **sizes))
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in key:
                tensor.uniform_(0.5, 1.5)
            elif "inv_freq" not in key:
                tensor.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    return folder


def edited(
    source: Path, target: Path, config: Callable[[Config], object] | None, tensors: Callable[[Tensors], object] | None = None
) -> Path:
    """Copy the checkpoint `source` to `target` with both edits applied."""
    shutil.copytree(source, target)
    if config is not None:
        data = json.loads((target / "config.json").read_text())
        config(data)
        (target / "config.json").write_text(json.dumps(data))
    if tensors is not None:
        data = load_file(target / "model.safetensors")
        tensors(data)
        save_file(data, target / "model.safetensors", metadata={"format": "pt"})
    return target


def ours(folder: Path, config: Config | None = None) -> Ours:
    """Return Tidegate's answer to a folder, or to its weights with another `config`."""
    told = logging.handlers.BufferingHandler(1 << 10)
    logging.getLogger("tidegate.engine").addHandler(told)
    try:
        spec = read_spec(folder) if config is None else parse_spec(config)
        context = min(spec.max_model_len, SIZES["max_position_embeddings"])
        resolve(EngineConfig(model=str(folder), max_model_len=context), spec.limits(), has_cuda=False)
        model = registry.build(spec, dtype=torch.float32, device=torch.device("cpu"))
        loader.load(model, folder)
    except TidegateError as error:
        return Ours(None, None, "", error)
    finally:
        logging.getLogger("tidegate.engine").removeHandler(told)
    (logits,) = PagedRun(model, [TOKENS], block_size=16).run(num_decoded=1)
    return Ours(scores(logits), spec.limits(), "\n".join([*spec.notes, *(record.getMessage() for record in told.buffer)]), None)


def theirs(folder: Path) -> torch.Tensor | None:
    """Return transformers' log-probabilities; None if it fails, or would make up weights that the file lacks."""
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"] or info["mismatched_keys"]:
            return None
        with torch.inference_mode():
            return scores(model.eval()(torch.tensor([TOKENS])).logits[0])
    except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError, AttributeError, StrictDataclassError):
        return None


def scores(logits: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each token of TOKENS after the first, from logits [len(TOKENS), V]."""
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(TOKENS[1:]).unsqueeze(1)).squeeze(1)
