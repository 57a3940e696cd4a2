"""Defines model shapes that are small enough to train for some steps in a test. They have every part of Tidepool and of its draft
model."""

from __future__ import annotations

import torch

from engine.models.families import parse_spec
from train.model import Decoder
from train.plan import Phase, Plan
from train.shapes import DRAFT, TIDEPOOL

VOCAB = 67
TINY_TIDEPOOL = TIDEPOOL | {
    "torch_dtype": "float32",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}
TINY_DRAFT = DRAFT | {
    "torch_dtype": "float32",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}


def make(config: dict[str, object], *, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(parse_spec(config), dtype=torch.float32)


def make_odd(config: dict[str, object]) -> Decoder:
    """Make a model whose norms are not 1 and whose biases are not 0, so that a test notices two exchanged tensors. The embedding
    and the routers have larger weights than usual."""
    model = make(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                tensor.normal_(0.0, 0.3)
            elif "gate.weight" in name or "embed" in name:
                tensor.normal_(0.0, 0.5)
    return model


def stream(length: int = 4000) -> torch.Tensor:
    """Make a token stream that a model can learn: a cycle of tokens, in which a tenth of the tokens is seeded noise."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(length) * 7 % VOCAB
    noise = torch.randint(VOCAB, (length,), generator=generator)
    return torch.where(torch.rand(length, generator=generator) < 0.1, noise, ids).to(torch.int16)


def plan(steps: int, **changes: object) -> Plan:
    base = {
        "tokens_per_step": 256,
        "micro_tokens": 64,
        "lr": 3e-3,
        "warmup": 2,
        "log_every": 1,
        "save_every": 3,
        "measure_every": 3,
    }
    phases = (Phase(0.0, 16), Phase(0.5, 32))
    return Plan(steps=steps, phases=phases, **(base | changes))
