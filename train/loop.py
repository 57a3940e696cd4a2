"""Runs the training loop for any objective: gradient accumulation, clipping, learning-rate schedule, log, and state on disk.

On several GPUs under torchrun, training is data parallel: each process computes its share of a step's windows, and torch's
DistributedDataParallel averages the gradients.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from train import state
from train.optimizer import make_optimizers
from train.plan import Plan
from train.windows import Windows

LOG, FACTS = "log.jsonl", "run.json"
PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12}  # FLOP/s in dense bfloat16, from the data sheets

Metrics = dict[str, torch.Tensor]


class Objective(nn.Module):
    """Computes the loss that a training run minimises.

    The forward takes ids [B, length + ahead] and returns a loss (a mean over tokens) and values to log (each is a mean, or a sum
    over the batch). `trained` is the module that is optimised and saved.
    """

    def __init__(self, trained: nn.Module, *, ahead: int) -> None:
        super().__init__()
        self.trained, self.ahead = trained, ahead

    def after_step(self, metrics: Metrics, left_of_decay: float) -> None:
        """The training loop calls this method after each step. `metrics` holds the logged values, summed over the step's forwards
        on all devices."""

    def flops_per_token(self, length: int) -> float:
        """Return the FLOPs of training on one token in windows of `length` tokens, forward and backward."""
        raise NotImplementedError

    def summary(self, metrics: Metrics) -> dict[str, float]:
        """Turn the means over a step's forwards into the fields of a log line."""
        return {name: float(value) for name, value in metrics.items()}


class Devices:
    """Holds this process's rank and device among the processes that train together. There is one process unless torchrun started
    several."""

    def __init__(self, device: str) -> None:
        self.num, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device(f"cuda:{local}" if device == "cuda" else device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.num > 1:
            dist.init_process_group("nccl" if device == "cuda" else "gloo")

    def sum(self, metrics: Metrics) -> Metrics:
        if self.num > 1:
            for name in sorted(metrics):
                dist.all_reduce(metrics[name])
        return metrics

    def close(self) -> None:
        if self.num > 1:
            dist.destroy_process_group()


class Training:
    def __init__(self, objective: Objective, plan: Plan, stream: torch.Tensor, devices: Devices, run: Path) -> None:
        self.objective, self.plan, self.devices, self.run = objective, plan, devices, run
        self.share = plan.share(devices.num)
        self.windows = {
            phase.length: Windows(stream, length=phase.length, ahead=objective.ahead, seed=plan.seed) for phase in plan.phases
        }
        self.optimizers = make_optimizers(objective.trained, lr=plan.lr)
        self.kind = {"plan": msgspec.json.encode(plan).decode(), "tokens": str(len(stream))}
        self.start, self.seconds = state.resume(run, objective.trained, self.optimizers, self.kind)
        # Processes do not broadcast buffers, since every process makes the same changes to its own buffers.
        self.forward: Any = DistributedDataParallel(objective, broadcast_buffers=False) if devices.num > 1 else objective

    def train(self, measure: Measure | None = None, *, until: int | None = None) -> None:
        """Run all remaining steps, or only the remaining steps before step `until`."""
        log, clock = _Log(self), time.perf_counter() - self.seconds
        with _progress(self) as advance:
            for step in range(self.start, self.plan.steps if until is None else until):
                metrics = self._step(step)
                done = step + 1
                if done % self.plan.log_every == 0 or done == self.plan.steps:
                    line = log.line(step, metrics)
                    if measure is not None and (done % self.plan.measure_every == 0 or done == self.plan.steps):
                        line |= measure()
                    log.write(line)
                    advance(done, line)
                if self.devices.rank == 0 and (done % self.plan.save_every == 0 or done == self.plan.steps):
                    self._save(done, time.perf_counter() - clock)

    def _save(self, done: int, seconds: float) -> None:
        """Save the training state and the facts of the run. `seconds` is the time spent on all steps so far, over all runs,
        including compilation and measurements."""
        state.save(self.run, self.objective.trained, self.optimizers, state.Progress(done, seconds), self.kind)
        device = self.devices.device
        facts = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "devices": self.devices.num,
            "torch": torch.__version__,
            "parameters": sum(p.numel() for p in self.objective.trained.parameters()),
            "flops_per_token": {str(phase.length): self.objective.flops_per_token(phase.length) for phase in self.plan.phases},
            "steps": done,
            "seconds": round(seconds, 1),
            "plan": msgspec.to_builtins(self.plan),
        }
        (self.run / FACTS).write_text(json.dumps(facts, indent=1) + "\n")

    def _step(self, step: int) -> Metrics:
        plan = self.plan
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate(step) * group["share"]
        total: Metrics = {}
        for micro in range(self.share.forwards):
            last = micro == self.share.forwards - 1
            with contextlib.nullcontext() if last or self.devices.num == 1 else self.forward.no_sync():
                loss, metrics = self.forward(self._rows(step, micro))
                (loss / self.share.forwards).backward()
            for name, value in metrics.items():
                total[name] = total[name] + value if name in total else value
        total = self.devices.sum(total)
        total["grad_norm"] = nn.utils.clip_grad_norm_(self.objective.trained.parameters(), plan.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.objective.after_step(total, plan.left_of_decay(step))
        return total

    def _rows(self, step: int, micro: int) -> torch.Tensor:
        phase, first = self.plan.phase(step)
        rows = self.share.tokens // phase.length
        index = ((step - first) * self.share.forwards + micro) * self.devices.num + self.devices.rank
        return self.windows[phase.length].rows(index * rows, rows)


class Measure(Protocol):
    """A function that measures the current quality of the model, and returns fields for the log line."""

    def __call__(self) -> dict[str, float]: ...


class _Log:
    """Appends lines to `log.jsonl`. A resumed run first drops the lines after the step that it starts with."""

    def __init__(self, training: Training) -> None:
        self.training, self.file = training, training.run / LOG
        self.last, self.clock = training.start, time.perf_counter()
        if training.devices.rank == 0:
            training.run.mkdir(parents=True, exist_ok=True)
            lines = self.file.read_text().splitlines() if self.file.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= training.start]
            self.file.write_text("".join(line + "\n" for line in kept))

    def line(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Make one log line. This waits for the device. Times count from the previous log line, without the time of
        measurements."""
        t, plan = self.training, self.training.plan
        forwards = t.share.forwards * t.devices.num
        norm = float(metrics.pop("grad_norm"))
        summary = t.objective.summary({name: value / forwards for name, value in metrics.items()})
        seconds = time.perf_counter() - self.clock
        if not math.isfinite(norm):
            raise SystemExit(f"step {step + 1}: the gradient is {norm}: start again in another --run with a lower learning rate")
        rate = (step + 1 - self.last) * plan.tokens_per_step / seconds
        phase, _ = plan.phase(step)
        line = {"step": step + 1, "tokens": (step + 1) * plan.tokens_per_step, "length": phase.length, **summary}
        line |= {"grad_norm": norm, "lr": plan.learning_rate(step), "tok_s": rate}
        peak = PEAK_FLOPS.get(torch.cuda.get_device_name()) if t.devices.device.type == "cuda" else None
        if peak is not None:
            line["mfu"] = rate * t.objective.flops_per_token(phase.length) / (peak * t.devices.num)
        self.last = step + 1
        return line

    def write(self, line: dict[str, float]) -> None:
        if self.training.devices.rank == 0:
            with self.file.open("a") as file:
                rounded = {key: value if isinstance(value, int) else float(f"{value:.6g}") for key, value in line.items()}
                file.write(json.dumps(rounded) + "\n")
        self.clock = time.perf_counter()


@contextlib.contextmanager
def _progress(training: Training) -> Iterator[Any]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), disable=training.devices.rank != 0) as progress:
        task = progress.add_task("", total=training.plan.steps, completed=training.start)

        def advance(done: int, line: dict[str, float]) -> None:
            about = "  ".join(f"{key} {line[key]:.4g}" for key in ("loss", "tok_s", "mfu") if key in line)
            progress.update(task, completed=done, description=about)

        yield advance
