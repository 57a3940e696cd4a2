"""Writes a tiny DeepSeek-V3-shaped checkpoint with random weights, for tests that need no sensible text.

The checkpoint has every part of the real architecture (MLA with low-rank queries and keys, a dense first layer, sigmoid routing
limited to groups of experts, a shared expert, YaRN), 1.8 M parameters, and a tokenizer of 512 tokens trained on the text below.
With the same version of numpy, the files are the same on every machine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")  # their token ids are 0 to 4
BOS, EOS = 0, 1
WEIGHT_STD = 0.08  # standard deviation of the weights; large enough that greedy tokens depend on the whole prompt
SEED = 2026

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "float32",
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "attention_bias": False,
    "intermediate_size": 384,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 64,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the model knows the roles system, user and assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# The tokenizer is trained on this text. It is written out so that every machine and Python version gets the same tokens.
CORPUS = """\
A tide gate lets the water through when the river runs out to the sea, and holds it when the sea runs in. A server for large \
language models does the same with requests: it lets in as many as the hardware can carry and holds the others at the door, so \
that those inside are answered in time. The user writes a prompt; the server turns the prompt into tokens, the engine reads the \
tokens and gives back one more, and then one more, until the answer is done or the limit has been reached.
What is the capital of France? The capital of France is Paris. Write a short story about a ship, a storm and the people who were \
there. Once upon a time there was a little boat that would not leave the harbour without its captain. Please explain how this \
works, step by step, and give an example. You are a helpful assistant. Hello, how are you today? I am fine, thank you.
Each request has a number of tokens that are computed and a number that are still to be computed. The scheduler chooses which \
of them run in the next step, the cache gives them blocks, and the runner carries the step out on the device. When the memory is \
full, a request with a lower priority gives up its blocks and starts again later. Because the keys and values of a shared \
beginning are the same, they are kept, and another conversation that begins with the same words need not wait for them again.
Summarise the following text in three sentences. Translate this sentence into German. Here is a list of things to remember: the \
first, the second, the third. It is important that the answer should be correct, but it should also be as short as possible.
def generate(request, tokens):
    for token in request.tokens:
        if token is None:
            return None
        yield token
class Server:
    def __init__(self, name: str, value: int = 0) -> None:
        self.name = name
        self.value = value
    async def start(self) -> None:
        print("the server is running at http://localhost:8000/v1/generate")
{"model": "demo", "prompt": "Hello", "max_tokens": 100, "temperature": 0.7, "stream": true}
0 1 2 3 4 5 6 7 8 9 10 11 12 20 30 40 50 60 70 80 90 100 1000 2000 2024 2025 2026
"""


def write_tiny_checkpoint(folder: Path) -> Path:
    """Write the checkpoint to `folder`. Returns `folder`."""
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS],
        "eos_token": SPECIAL_TOKENS[EOS],
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": BOS, "eos_token_id": EOS}))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "tokenizer.json").write_text(tiny_tokenizer().to_str())
    save_file(_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tiny_tokenizer() -> Tokenizer:
    """Make a byte-level BPE tokenizer. Encoding a text and decoding the tokens gives the same text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.splitlines(keepends=True), trainer)
    begin = SPECIAL_TOKENS[BOS]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, BOS)]
    )
    return tokenizer


def _weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(SEED)
    tensors = {}
    for name, shape in _shapes().items():
        if name.endswith("norm.weight"):
            tensors[name] = np.ones(shape, np.float32)
        else:
            tensors[name] = random.normal(0.0, WEIGHT_STD, shape).astype(np.float32)
    return tensors


def _shapes() -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by its Hugging Face name. Matrices are [out, in]."""
    hidden, vocab = CONFIG["hidden_size"], CONFIG["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        block = _attention_shapes() | _mlp_shapes(dense=layer < CONFIG["first_k_dense_replace"])
        block |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        shapes |= {prefix + name: shape for name, shape in block.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def _attention_shapes() -> dict[str, tuple[int, ...]]:
    hidden, heads = CONFIG["hidden_size"], CONFIG["num_attention_heads"]
    nope, rope, value = CONFIG["qk_nope_head_dim"], CONFIG["qk_rope_head_dim"], CONFIG["v_head_dim"]
    q_rank, kv_rank = CONFIG["q_lora_rank"], CONFIG["kv_lora_rank"]
    return {
        "self_attn.q_a_proj.weight": (q_rank, hidden),
        "self_attn.q_a_layernorm.weight": (q_rank,),
        "self_attn.q_b_proj.weight": (heads * (nope + rope), q_rank),
        "self_attn.kv_a_proj_with_mqa.weight": (kv_rank + rope, hidden),
        "self_attn.kv_a_layernorm.weight": (kv_rank,),
        "self_attn.kv_b_proj.weight": (heads * (nope + value), kv_rank),
        "self_attn.o_proj.weight": (hidden, heads * value),
    }


def _mlp_shapes(*, dense: bool) -> dict[str, tuple[int, ...]]:
    if dense:
        return _gated_shapes("mlp.", CONFIG["intermediate_size"])
    experts, width = CONFIG["n_routed_experts"], CONFIG["moe_intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "mlp.gate.weight": (experts, CONFIG["hidden_size"]),
        "mlp.gate.e_score_correction_bias": (experts,),
    }
    for expert in range(experts):
        shapes |= _gated_shapes(f"mlp.experts.{expert}.", width)
    return shapes | _gated_shapes("mlp.shared_experts.", CONFIG["n_shared_experts"] * width)


def _gated_shapes(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    hidden = CONFIG["hidden_size"]
    return {
        f"{prefix}gate_proj.weight": (width, hidden),
        f"{prefix}up_proj.weight": (width, hidden),
        f"{prefix}down_proj.weight": (hidden, width),
    }
