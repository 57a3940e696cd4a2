"""Defines the trainable decoder: a trunk of blocks, a tied head, and (if the spec has one) a multi-token prediction (MTP) module.

    tokens  t0 t1 t2 ... --trunk, norm--> hidden h0 h1 ...      head(h_i) predicts t_(i+1)
    MTP:    eh_proj(enorm(embed(t_(i+1))) | hnorm(h_i)) --block, norm--> head predicts t_(i+2)

Source of the MTP module: DeepSeek-V3 technical report (arXiv 2412.19437), section 2.2. As in servers that speculate with
it, h is the trunk's output after its final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from engine.layers.rotary import Rotary
from engine.models.spec import ModelSpec
from train.layers import Angles, Block, GatedMlp, Linear, MoeMlp, RMSNorm

COMPILED_VARIANTS = 32  # most compilations of a block: kinds of blocks x window lengths x with and without gradients

CrossEntropy = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Losses(NamedTuple):
    """Holds the mean losses over all tokens, in nats, and the load of the experts."""

    next_token: torch.Tensor
    second_token: torch.Tensor | None  # loss of the MTP module, or None without one
    load: torch.Tensor | None  # [layers with experts, E]: number of tokens that each expert got


class MtpBlock(Block):
    def __init__(self, spec: ModelSpec, mlp: GatedMlp | MoeMlp, *, out_scale: float) -> None:
        super().__init__(spec, mlp, out_scale=out_scale)
        self.enorm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.hnorm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.eh_proj = Linear(2 * spec.hidden_size, spec.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(spec.hidden_size, spec.norm_eps)})

    def join(self, embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Make the MTP block's input from the next tokens' embeddings and the trunk's output. All are [B, T, H]."""
        joined: torch.Tensor = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1))
        return joined


class Trunk(nn.Module):
    """Holds the decoder's embedding, blocks and final norm. Blocks from index spec.num_layers on are MTP blocks."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        if not spec.tie_embeddings or spec.num_mtp_layers > 1:
            raise ValueError("trained here are models with tied embeddings and at most one MTP layer")
        out_scale = (2 * spec.num_layers) ** -0.5  # GPT-2's initial scale of what is added to the residual stream
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=spec.hidden_size**-0.5)  # the tied head then gives logits of about 1
        kinds = [Block] * spec.num_layers + [MtpBlock] * spec.num_mtp_layers
        self.layers = nn.ModuleList(kind(spec, _mlp(spec, i, out_scale), out_scale=out_scale) for i, kind in enumerate(kinds))
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps)


class Decoder(nn.Module):
    """Predicts tokens with a trunk, a tied head and possibly an MTP module. `dtype` is the type of the activations; parameters
    are float32."""

    def __init__(self, spec: ModelSpec, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec, self.dtype = spec, dtype
        self.model = Trunk(spec)
        self.rotary = Rotary(spec.rope, device=torch.device("cpu"))
        self.cross_entropy: CrossEntropy = cross_entropy

    def compile(self) -> None:
        """Compile each block separately, so that blocks of one kind share a compilation.

        The loss is compiled too, so that no logits are stored.
        """
        torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
        for block in self.model.layers:
            block.compile(fullgraph=True, dynamic=False)
        self.cross_entropy = torch.compile(cross_entropy, fullgraph=True, dynamic=False)

    @property
    def blocks(self) -> list[Block]:
        return [block for block in self.model.layers if isinstance(block, Block)]

    def moe_layers(self) -> Iterator[MoeMlp]:
        """Yield the MLP of each layer with experts, in the order of the rows of `Losses.load`."""
        return (block.mlp for block in self.blocks if isinstance(block.mlp, MoeMlp))

    def hidden(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the trunk on ids [B, T] -> its output after the final norm [B, T, H], and the load of each expert layer."""
        angles, loads = self._angles(ids), []
        x = self._embed(ids)
        for block in self.blocks[: self.spec.num_layers]:
            x, load = block(x, angles)
            loads += [] if load is None else [load]
        return self.model.norm(x), loads

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight.to(hidden.dtype))

    def second_hidden(self, hidden: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the MTP module on `hidden` [B, T, H] -> output [B, T, H] and the load of its experts. `after` [B, T] holds the
        token after each position of `hidden`."""
        block = self.blocks[-1]
        assert isinstance(block, MtpBlock)
        out, load = block(block.join(self._embed(after), hidden), self._angles(after))
        normed: torch.Tensor = block.shared_head["norm"](out)
        return normed, load

    def forward(self, ids: torch.Tensor) -> Losses:
        """Compute the losses for token ids [B, T + 1], or [B, T + 2] if the model has an MTP module."""
        with_mtp = self.spec.num_mtp_layers > 0
        length = ids.shape[1] - 1 - with_mtp
        hidden, loads = self.hidden(ids[:, :length])
        head = self.model.embed_tokens.weight
        first, second = self.cross_entropy(hidden, head, ids[:, 1 : length + 1]), None
        if with_mtp:
            guessed, load = self.second_hidden(hidden, ids[:, 1 : length + 1])
            second = self.cross_entropy(guessed, head, ids[:, 2:])
            loads += [] if load is None else [load]
        return Losses(first, second, torch.stack(loads) if loads else None)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.model.embed_tokens(ids)
        return embedded.to(self.dtype)

    def _angles(self, ids: torch.Tensor) -> Angles:
        cos, sin = self.rotary(torch.arange(ids.shape[1], device=ids.device))
        return cos, sin


def _mlp(spec: ModelSpec, index: int, out_scale: float) -> GatedMlp | MoeMlp:
    moe = spec.moe
    if moe is None or (index not in moe.layers and index < spec.num_layers):
        return GatedMlp(spec.hidden_size, spec.intermediate_size, out_scale=out_scale)
    return MoeMlp(spec, moe.routing, moe.intermediate_size, moe.shared_size, out_scale=out_scale)


def cross_entropy(hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy over tokens in nats, given hidden [B, T, H], head [V, H] and targets [B, T]."""
    logits = F.linear(hidden.flatten(0, 1), head.to(hidden.dtype)).float()
    return F.cross_entropy(logits, targets.flatten())


def active_parameters(model: Decoder, *, mtp: bool = True) -> int:
    """Return the number of weights that one token is multiplied with. The head counts once for each prediction (next token, MTP).
    Of the experts, only the chosen ones count."""
    moe, layers = model.spec.moe, model.spec.num_layers
    share = 1.0 if moe is None else moe.routing.top_k / moe.routing.num_experts
    total = 0.0
    for name, p in model.named_parameters():
        if p.ndim > 1 and (mtp or not name.startswith(f"model.layers.{layers}.")):
            total += p.numel() * (share if ".experts." in name else 1.0)
    heads = model.spec.num_mtp_layers if mtp else 0  # the embedding's weights already count as the first head
    return round(total) + heads * model.model.embed_tokens.weight.numel()


def flops_per_token(model: Decoder, length: int, *, mtp: bool = True) -> float:
    """Return the FLOPs of training on one token: every product forward and backward (6 FLOPs per weight), and causal attention in
    windows of `length` tokens."""
    spec = model.spec
    head_dims = spec.head_dim + (spec.mla.v_dim if spec.mla is not None else spec.head_dim)
    scores = spec.num_heads * head_dims * length / 2  # multiply-adds; on average a token attends to half of the window
    return 6.0 * (active_parameters(model, mtp=mtp) + (spec.num_layers + (spec.num_mtp_layers if mtp else 0)) * scores)
