"""Fills a model with seeded random weights, for a run without a checkpoint.

Norm weights are 1, biases are 0, and all other weights are N(0, 0.02).
"""

from __future__ import annotations

import torch
from torch import nn

from engine.layers.norm import RMSNorm
from engine.startup import Progress, no_report

STD = 0.02


def fill(model: nn.Module, *, seed: int, progress: Progress = no_report) -> None:
    """Fill every parameter of `model` with random weights, and call `progress` after each parameter."""
    norms = {id(m.weight) for m in model.modules() if isinstance(m, RMSNorm)}
    for name, param in model.named_parameters():
        generator = torch.Generator(param.device).manual_seed(seed)
        seed += 1
        if id(param) in norms:
            param.fill_(1.0)
        elif name.endswith("bias"):
            param.zero_()
        else:
            param.normal_(0.0, STD, generator=generator)
        progress()
