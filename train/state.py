"""A run on disk: everything that the next step depends on, as one safetensors file that is replaced whole."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

STATE = "state.safetensors"


def save(run: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    """`step` is the next one to do."""
    partial = run / (STATE + ".partial")
    tensors = {name: t.detach().cpu().contiguous() for name, t in _tensors(model, optimizers).items()}
    save_file(tensors, partial, metadata={"step": str(step)})
    os.replace(partial, run / STATE)


def resume(run: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Put the saved state back -> the step to go on with; 0 where nothing is saved. Raises SystemExit where it is of another
    model."""
    file = run / STATE
    if not file.exists():
        return 0
    for optimizer in optimizers:
        _ensure_state(optimizer)
    targets = _tensors(model, optimizers)
    with safe_open(str(file), framework="pt") as saved, torch.no_grad():
        names, step = set(saved.keys()), int(saved.metadata()["step"])
        if names != set(targets):
            odd = sorted(names.symmetric_difference(targets))
            raise SystemExit(f"{file} is of another model (for one, {odd[0]}): give another --run, or delete the file")
        for name, target in targets.items():
            target.copy_(saved.get_tensor(name))
    return step


def load_model(run: Path, model: nn.Module) -> None:
    """Fill `model` from the state in `run`, optimizers left aside. Raises SystemExit where there is none."""
    file = run / STATE
    if not file.exists():
        raise SystemExit(f"{file}: no such file; a run of training writes it")
    with safe_open(str(file), framework="pt") as saved:
        model.load_state_dict({name: saved.get_tensor(name) for name in model.state_dict()})


def _tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    out = dict(model.state_dict())
    names: dict[torch.Tensor, str] = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for p, values in optimizer.state.items():
            out |= {f"{key}:{names[p]}": value for key, value in values.items()}
    return out


def _ensure_state(optimizer: torch.optim.Optimizer) -> None:
    """torch's optimizers make their state in the first step: do one that changes nothing."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
