"""Multi-head latent attention in plain torch. CPUs run this implementation, and it is the plain twin of `triton_mla.py`.

`torch_step.py` plans a step. A decode attends in latent space: the key expansion is applied to the query before
attention (`absorb`), and the value expansion to the averaged latents after it (`expand_output`). A prefill chunk expands its
sequence's latents to keys and values (`expand_latent`). Source: DeepSeek-V2 (arXiv 2405.04434, section 2.1).
"""

from __future__ import annotations

import torch

from engine.attention.torch_step import GatheredStep, TorchPaged, attend_chunk
from engine.batch import ForwardBatch, LayerPools


class TorchMla(TorchPaged):
    """Multi-head latent attention in plain torch, on any device. Implements PagedMla."""

    def prepare(self, batch: ForwardBatch) -> TorchMlaStep:
        return TorchMlaStep(GatheredStep.of(batch))


class TorchMlaStep:
    """Multi-head latent attention for the tokens of one step, in plain torch. Implements MlaStep."""

    def __init__(self, step: GatheredStep) -> None:
        self._step = step

    def attend(
        self, q: torch.Tensor, latent: torch.Tensor, kv_b: torch.Tensor, pools: LayerPools, *, scale: float
    ) -> torch.Tensor:
        pool = pools["latent"].unsqueeze(2)  # [num_blocks, block_size, 1, rank + rope]: one K/V head for all query heads
        decodes, rank = self._step.num_decodes, kv_b.shape[2]
        nope = q.shape[2] - (latent.shape[1] - rank)
        out = torch.empty(*q.shape[:2], kv_b.shape[1] - nope, dtype=q.dtype, device=q.device)
        if decodes:
            mixed = self._step.decode(absorb(q[:decodes], kv_b, nope), pool, pool, scale)[..., :rank]
            out[:decodes] = expand_output(mixed, kv_b, nope)
        for chunk in self._step.chunks:
            span = slice(chunk.begin, chunk.end)
            cached = latent[span] if chunk.source is None else chunk.source.read(pool)[0, 0]  # [L, rank + rope]
            out[span] = attend_chunk(q[span], *expand_latent(cached, kv_b, nope), chunk.mask, scale)
        return out


def absorb(q: torch.Tensor, kv_b: torch.Tensor, nope: int) -> torch.Tensor:
    """Move the key expansion W_k of kv_b to the queries, since q . (W_k c) = (W_k^T q) . c.

    q [D, heads, nope + rope] -> [W_k^T q_nope | q_rope], [D, heads, rank + rope].
    """
    q_latent = torch.bmm(q[..., :nope].transpose(0, 1), kv_b[:, :nope]).transpose(0, 1)  # [D, heads, rank]
    return torch.cat((q_latent, q[..., nope:]), -1)


def expand_output(mixed: torch.Tensor, kv_b: torch.Tensor, nope: int) -> torch.Tensor:
    """Expand averaged latents, mixed [D, heads, rank], by W_v of kv_b to averages of values, [D, heads, v_dim]."""
    return torch.bmm(mixed.transpose(0, 1), kv_b[:, nope:].transpose(1, 2)).transpose(0, 1)


def expand_latent(cached: torch.Tensor, kv_b: torch.Tensor, nope: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Expand records, cached [L, rank + rope], to keys [heads, L, nope + rope] and values [heads, L, v_dim]."""
    heads, _, rank = kv_b.shape
    expanded = torch.matmul(cached[:, :rank], kv_b.transpose(1, 2))  # [heads, L, nope + v_dim]
    shared = cached[:, rank:].expand(heads, -1, -1)
    return torch.cat((expanded[..., :nope], shared), -1), expanded[..., nope:]
