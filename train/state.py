"""Saves and restores the state of a training run: all that the next step depends on, in one safetensors file, replaced
atomically."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

STATE = "state.safetensors"


class Progress(NamedTuple):
    step: int  # number of the step that comes next
    seconds: float  # time spent on all earlier steps


def save(run: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], progress: Progress, kind: dict[str, str]) -> None:
    """Save the state of a training run in the folder `run`. `kind` describes the run; only a run of the same kind may resume the
    state."""
    partial = run / (STATE + ".partial")
    tensors = {name: t.detach().cpu().contiguous() for name, t in _tensors(model, optimizers).items()}
    save_file(tensors, partial, metadata={"step": str(progress.step), "seconds": str(progress.seconds), **kind})
    os.replace(partial, run / STATE)


def resume(run: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], kind: dict[str, str]) -> Progress:
    """Restore the saved state of a training run, if there is one. Raises SystemExit if the state belongs to another kind of
    run."""
    file = run / STATE
    if not file.exists():
        return Progress(0, 0.0)
    for optimizer in optimizers:
        _ensure_state(optimizer)
    targets = _tensors(model, optimizers)
    with safe_open(str(file), framework="pt") as saved, torch.no_grad():
        found = saved.metadata()
        _check_same(file, {name: str(saved.get_slice(name).get_shape()) for name in saved.keys()}, _shapes(targets))  # noqa: SIM118
        _check_same(file, {key: found.get(key, "nothing") for key in kind}, kind)
        for name, target in targets.items():
            target.copy_(saved.get_tensor(name))
    return Progress(int(found["step"]), float(found["seconds"]))


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: str(list(tensor.shape)) for name, tensor in tensors.items()}


def _check_same(file: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    for key in sorted(saved.keys() | wanted.keys()):
        was, now = saved.get(key, "nothing"), wanted.get(key, "nothing")
        if was != now:
            raise SystemExit(
                f"{file} is of another run: {key} was {was}, and is {now} now. Give another --run, or delete the file"
            )


def load_model(run: Path, model: nn.Module) -> None:
    """Fill `model` with the weights of the state saved in `run`. Raises SystemExit if there is no saved state."""
    file = run / STATE
    if not file.exists():
        raise SystemExit(f"{file}: no such file; a run of training writes it")
    with safe_open(str(file), framework="pt") as saved:
        shapes = {name: str(saved.get_slice(name).get_shape()) for name in saved.keys() if ":" not in name}  # noqa: SIM118
        _check_same(file, shapes, _shapes(model.state_dict()))
        model.load_state_dict({name: saved.get_tensor(name) for name in model.state_dict()})


def _tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    out = dict(model.state_dict())
    names: dict[torch.Tensor, str] = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for p, values in optimizer.state.items():
            out |= {f"{key}:{names[p]}": value for key, value in values.items()}
    return out


def _ensure_state(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer of torch create its state, by running a step that changes nothing. Otherwise the first real step would
    create the state."""
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
