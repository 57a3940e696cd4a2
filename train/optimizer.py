"""Defines the optimisers: Muon for the matrices of the layers, AdamW for the rest (embedding, norms, routers).

Muon steps along the orthogonal matrix nearest to the momentum, which a Newton-Schulz iteration approximates: K. Jordan et
al., "Muon: An optimizer for hidden layers in neural networks" (2024). The step is scaled to AdamW's typical size, so that
both share one learning rate: J. Liu et al., "Muon is Scalable for LLM Training" (arXiv 2502.16982), section 2.2.
torch.optim.Muon takes matrices one by one, which is thousands of launches per step for hundreds of small matrices. This
version processes all matrices of one shape at once, stacked experts included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the iteration's quintic polynomial, from Jordan et al.
ITERATIONS = 5
ADAM_BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
ADAM_SHARE = 0.5  # AdamW's learning rate divided by Muon's


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Approximate U V^T of each matrix's singular value decomposition, for matrices [N, rows, columns].

    The singular values of the result lie between 0.7 and 1.2.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: torch.Tensor = (x.mT if tall else x).to(matrices.dtype)
    return out


class Muon(torch.optim.Optimizer):
    """Implements the Muon optimiser. A parameter has two dimensions, or three if it is a stack of matrices."""

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float) -> None:
        super().__init__(params, {"lr": lr, "share": 1.0})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                shapes[p.shape[-2:]].append(p)
            for params in shapes.values():
                self._step_alike(params, group["lr"])

    def _step_alike(self, params: list[nn.Parameter], lr: float) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        assert len(grads) == len(params), "every matrix has a part in the loss"
        momenta = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(grads, momenta, MOMENTUM)  # Nesterov momentum
        rows, columns = params[0].shape[-2:]
        stacked = torch.cat([update.view(-1, rows, columns) for update in ahead])
        directions = torch.split(orthogonalize(stacked), [p.numel() // (rows * columns) for p in params])
        weights: list[torch.Tensor] = list(params)
        torch._foreach_mul_(weights, 1 - lr * WEIGHT_DECAY)
        updates = [direction.view_as(p) for direction, p in zip(directions, params, strict=True)]
        torch._foreach_add_(weights, updates, alpha=-lr * 0.2 * max(rows, columns) ** 0.5)


def make_optimizers(model: nn.Module, *, lr: float) -> list[torch.optim.Optimizer]:
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        inner = p.ndim > 1 and "embed_tokens" not in name and ".gate.weight" not in name
        (matrices if inner else others).append(p)
    adam = torch.optim.AdamW([{"params": others, "share": ADAM_SHARE}], lr=lr, betas=ADAM_BETAS, weight_decay=0.0, fused=True)
    return [Muon(matrices, lr=lr), adam]
