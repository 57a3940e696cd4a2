"""Trains Tidepool: `python -m train.pretrain`, or under torchrun on several GPUs. A run continues where an earlier one stopped.

Experts are balanced without an auxiliary loss: after each step an expert's selection bias moves up if it got less than its
share of the tokens, and down if it got more (DeepSeek-V3, section 2.1.2).
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from engine.models.families import parse_spec
from train.loop import Devices, Metrics, Objective, Training
from train.model import Decoder, flops_per_token
from train.plan import Phase, Plan
from train.shapes import CONTEXT, TIDEPOOL
from train.tokens import FACTS, HELDOUT, TRAIN

BIAS_SPEED = 3e-3
SECOND_TOKEN_WEIGHT = 0.3

DEFAULT = Plan(
    steps=14000,
    tokens_per_step=65536,
    micro_tokens=65536,
    lr=4e-3,
    phases=(Phase(0.0, 1024), Phase(0.7, CONTEXT)),
    warmup=200,
    log_every=50,
    measure_every=1000,
    save_every=2000,
)


class Pretraining(Objective):
    """Computes the pretraining loss: the loss of the next token plus the weighted loss of the MTP module."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model, ahead=1 + model.spec.num_mtp_layers)
        self.model = model

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
        out = self.model(ids)
        metrics: Metrics = {"loss": out.next_token.detach()}
        loss: torch.Tensor = out.next_token
        if out.second_token is not None:
            loss = loss + SECOND_TOKEN_WEIGHT * out.second_token
            metrics["second_loss"] = out.second_token.detach()
        if out.load is not None:
            metrics["load"] = out.load
        return loss, metrics

    @torch.no_grad()
    def after_step(self, metrics: Metrics, left_of_decay: float) -> None:
        if "load" not in metrics:
            return
        for layer, load in zip(self.model.moe_layers(), metrics["load"], strict=True):
            layer.gate.e_score_correction_bias += BIAS_SPEED * left_of_decay * (load.mean() - load).sign()

    def flops_per_token(self, length: int) -> float:
        return flops_per_token(self.model, length)

    def summary(self, metrics: Metrics) -> dict[str, float]:
        load = metrics.pop("load", None)
        balance = {} if load is None else {"max_over_mean": float((load.amax(1) / load.mean(1)).max())}
        return super().summary(metrics) | balance


class HeldOut:
    """Measures bits per byte on the held-out stream in windows of `length`, for the training curve.

    The published figures come from `train.evaluate`, which gives each token more context.
    """

    def __init__(self, model: Decoder, work: Path, *, length: int) -> None:
        facts = json.loads((work / FACTS).read_text())
        self.model, self.tokens_per_byte = model, facts["heldout_tokens"] / facts["heldout_bytes"]
        stream = load_stream(work / HELDOUT, next(model.parameters()).device)
        num = (len(stream) - 1) // length
        at = torch.arange(num, device=stream.device).unsqueeze(1) * length
        self.ids = stream[at + torch.arange(length + 1, device=stream.device)].long()

    def __call__(self) -> dict[str, float]:
        head, total = self.model.model.embed_tokens.weight, 0.0
        # The measurement runs uncompiled: it takes about a second, and compilation would take longer.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for ids in torch.split(self.ids, 16):
                hidden, _ = self.model.hidden(ids[:, :-1])
                total += float(self.model.cross_entropy(hidden, head, ids[:, 1:])) * len(ids)
        mean = total / len(self.ids)
        return {"heldout_bits_per_byte": mean / math.log(2) * self.tokens_per_byte}


def load_stream(file: Path, device: torch.device) -> torch.Tensor:
    if not file.exists():
        raise SystemExit(f"{file}: no such file; `python -m train.tokens` writes it")
    return torch.from_numpy(np.fromfile(file, dtype=np.int16)).to(device)


def build(config: dict[str, Any], device: torch.device, *, seed: int) -> Decoder:
    """Build the model of `config`. On CUDA the model is compiled and computes in bfloat16 with float32 parameters."""
    on_cuda = device.type == "cuda"
    torch.manual_seed(seed)
    model = Decoder(parse_spec(config), dtype=torch.bfloat16 if on_cuda else torch.float32).to(device)
    if on_cuda:
        model.compile()
    return model


def main(
    work: Annotated[Path, typer.Option(help="Folder of the tokens.")] = Path(".cache/train"),
    run: Annotated[Path, typer.Option(help="Folder of this run: its log, and its state to resume from.")] = Path(
        ".cache/train/tidepool"
    ),
    steps: Annotated[int, typer.Option(help="Steps of 65,536 tokens.")] = DEFAULT.steps,
    lr: Annotated[float, typer.Option(help="Learning rate between warm-up and decay.")] = DEFAULT.lr,
) -> None:
    """Train Tidepool on the tokens in WORK."""
    devices = Devices("cuda" if torch.cuda.is_available() else "cpu")
    plan = DEFAULT.with_steps(steps, lr=lr)
    model = build(TIDEPOOL, devices.device, seed=plan.seed)
    run.mkdir(parents=True, exist_ok=True)
    training = Training(Pretraining(model), plan, load_stream(work / TRAIN, devices.device), devices, run)
    started = time.perf_counter()
    training.train(HeldOut(model, work, length=CONTEXT) if devices.rank == 0 else None)
    if devices.rank == 0:
        typer.echo(f"steps {training.start} to {plan.steps} in {time.perf_counter() - started:.0f} s")
    devices.close()


if __name__ == "__main__":
    typer.run(main)
