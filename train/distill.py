"""Trains the draft model to predict what Tidepool predicts: `python -m train.distill`, or under torchrun.

The loss is the Kullback-Leibler divergence of the full next-token distributions, teacher to student, on the texts that the
teacher was trained on.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.nn import functional as F

from engine.models.families import parse_spec
from train import state
from train.loop import Devices, Metrics, Objective, Training
from train.model import Decoder, flops_per_token
from train.plan import Phase, Plan
from train.pretrain import build, load_stream
from train.shapes import CONTEXT, DRAFT, TIDEPOOL
from train.tokens import TRAIN

DEFAULT = Plan(
    steps=2000,
    tokens_per_step=65536,
    micro_tokens=65536,
    lr=3e-3,
    phases=(Phase(0.0, 1024), Phase(0.8, CONTEXT)),
    log_every=50,
    seed=2027,
)


class Distillation(Objective):
    def __init__(self, student: Decoder, teacher: Decoder) -> None:
        super().__init__(student, ahead=0)
        self.student, self.teacher = student, teacher.requires_grad_(False)
        compiled = next(student.parameters()).is_cuda
        self.divergence = torch.compile(divergence, fullgraph=True, dynamic=False) if compiled else divergence

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
        with torch.no_grad():
            wanted, _ = self.teacher.hidden(ids)
        hidden, _ = self.student.hidden(ids)
        heads = (self.teacher.model.embed_tokens.weight, self.student.model.embed_tokens.weight)
        loss, agreement = self.divergence(wanted, hidden, *heads)
        return loss, {"loss": loss.detach(), "agreement": agreement}

    def flops_per_token(self, length: int) -> float:
        """Return the FLOPs of one token: training of the student, plus the forward of the teacher without its MTP module. A
        forward takes a third of the FLOPs of training."""
        student, teacher = self.student, self.teacher
        return flops_per_token(student, length) + flops_per_token(teacher, length, mtp=False) / 3


def divergence(
    wanted: torch.Tensor, hidden: torch.Tensor, wanted_head: torch.Tensor, head: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare the predictions of teacher (`wanted`) and student, given by hidden states [B, T, H] and heads [V, H].

    Returns the mean divergence in nats, and the share of positions at which both have the same argmax.
    """
    teacher = F.linear(wanted.flatten(0, 1), wanted_head.to(wanted.dtype)).float()
    student = F.linear(hidden.flatten(0, 1), head.to(hidden.dtype)).float()
    loss = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")
    return loss, (student.argmax(-1) == teacher.argmax(-1)).float().mean()


def load_teacher(run: Path, device: torch.device) -> Decoder:
    """Load the model that `train.pretrain` saved in the folder `run`. Raises SystemExit if there is no saved model."""
    teacher = Decoder(parse_spec(TIDEPOOL), dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    state.load_model(run, teacher)
    teacher.to(device)
    if device.type == "cuda":
        teacher.compile()
    return teacher


def main(
    work: Annotated[Path, typer.Option(help="Folder of the tokens.")] = Path(".cache/train"),
    teacher: Annotated[Path, typer.Option(help="Folder of Tidepool's run.")] = Path(".cache/train/tidepool"),
    run: Annotated[Path, typer.Option(help="Folder of this run.")] = Path(".cache/train/tidepool-draft"),
    steps: Annotated[int, typer.Option(help="Steps of 65,536 tokens.")] = DEFAULT.steps,
) -> None:
    """Distil the draft model from Tidepool."""
    devices = Devices("cuda" if torch.cuda.is_available() else "cpu")
    plan = DEFAULT.with_steps(steps)
    objective = Distillation(build(DRAFT, devices.device, seed=plan.seed), load_teacher(teacher, devices.device))
    run.mkdir(parents=True, exist_ok=True)
    training = Training(objective, plan, load_stream(work / TRAIN, devices.device), devices, run)
    started = time.perf_counter()
    training.train()
    if devices.rank == 0:
        typer.echo(f"steps {training.start} to {plan.steps} in {time.perf_counter() - started:.0f} s")
    devices.close()


if __name__ == "__main__":
    typer.run(main)
