"""Calls cuDNN's attention through torch, with each row's log-sum-exp. The file also has the plain twin of the call.

cuDNN plans a kernel the first time that it sees a combination of shapes and strides. A plan takes 65 to 90 ms, and the first plan
of a process more than a second. Callers therefore pad to a few lengths, and a server makes the plans of these lengths before
requests need them. `plans.py` knows which exist: a chunk whose plan does not exist goes to our own kernels, and no request waits.
"""

from __future__ import annotations

import torch

from engine.kernels.hardware import is_gpu
from engine.kernels.merge_parts import Part

MAX_HEAD = 128  # largest head for which every cuDNN version that torch 2.11 or later ships has a Hopper kernel
DTYPES = (torch.bfloat16, torch.float16)
LATENT_HEADS = (192, 128)  # sizes of DeepSeek's query and value heads, for which cuDNN has a kernel too


def load_library(device: torch.device, dtype: torch.dtype) -> None:
    """Make cuDNN load its code for attention, which takes about a second, by a call for a few numbers."""
    q = torch.zeros(64, 1, 64, dtype=dtype, device=device)
    attend_part(q, q, q, 1.0, causal=True)
    torch.cuda.synchronize(device)


def takes(dtype: torch.dtype, dim: int, v_dim: int) -> bool:
    """Whether cuDNN has a kernel for query heads [dim] and value heads [v_dim] of this type."""
    if dtype not in DTYPES:
        return False
    return (dim == v_dim and dim <= MAX_HEAD and dim % 8 == 0) or (dim, v_dim) == LATENT_HEADS


def attend_part(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, causal: bool) -> Part:
    """Attend from q [T, heads, dim] to keys k [S, kv_heads, dim] and values v [S, kv_heads, v_dim].

    With `causal`, S must be T, and row i sees keys 0 .. i. On CUDA cuDNN computes this, at 685 TFLOP/s for 8,192 rows over 8,192
    keys without a mask (docs/gpu.md). On a CPU the plain twin computes it.
    """
    if not is_gpu(q.device):
        return attend_part_plain(q, k, v, scale, causal=causal)
    queries, keys, values = (x.unsqueeze(0).transpose(1, 2) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        queries, keys, values, None, True, 0.0, causal, False, scale=scale
    )[:2]
    return Part(out[0].transpose(0, 1), lse.view(lse.shape[1], lse.shape[2]))


def attend_part_plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, causal: bool) -> Part:
    """Compute the result of `attend_part` in plain torch, in float32."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.float(), keys) * scale
    if causal:
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    out = torch.einsum("hts,shd->thd", (scores - lse.unsqueeze(-1)).exp(), values)
    return Part(out.to(q.dtype), lse)
