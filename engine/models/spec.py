"""ModelSpec: the architecture and sizes of a model, as frozen values. Torch-free.

`families.py` reads a checkpoint's config.json into a ModelSpec. The model modules are built from it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from engine.config import ModelLimits
from engine.layers.kinds import RopeSpec, RoutingSpec

DTypeName = Literal["float32", "bfloat16", "float16"]


class MlaSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Multi-head latent attention: keys and values are projections of one cached latent of kv_lora_rank + rope_dim numbers."""

    q_lora_rank: int | None  # size between the two projections that make the queries; None: one projection makes the queries
    kv_lora_rank: int
    nope_dim: int  # numbers of a query or key head that have no rotary embedding
    rope_dim: int  # numbers of a query or key head that have rotary embedding
    v_dim: int
    softmax_scale: float


class MoeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Mixture of experts in the layers `layers`; all other layers have a dense MLP."""

    routing: RoutingSpec
    intermediate_size: int  # intermediate size of one routed expert
    shared_size: int  # intermediate size of all shared experts together; 0 if there are none
    layers: tuple[int, ...]
    float32_router: bool = False  # the router's weight and product are float32 whatever the model's type


class Fp8Spec(msgspec.Struct, frozen=True, kw_only=True):
    """The checkpoint stores weights as float8 e4m3, with one float32 scale for each block of `block` (rows, columns)."""

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
    qk_norm: bool = False  # queries and keys are normed, each head by itself
    qk_norm_all: bool = False  # queries are normed over all their heads together, and so are keys
    sliding_window: int | None = None  # tokens that some layer attends to; only contexts that fit into it are supported
    nope_layers: tuple[int, ...] = ()  # layers without rotary embedding
    mla: MlaSpec | None = None
    moe: MoeSpec | None = None
    fp8: Fp8Spec | None = None
    num_mtp_layers: int = 0  # multi-token prediction layers that the checkpoint may hold after its num_layers layers
    notes: tuple[str, ...] = ()  # what the log has to say about the checkpoint's config when the engine starts

    def limits(self) -> ModelLimits:
        """Return the few values of the spec that the scheduler and the service need."""
        return ModelLimits(
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            dtype=self.dtype,
            sliding_window=self.sliding_window,
        )
