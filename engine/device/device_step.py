"""DeviceStep: a step that was submitted to the device, and its result once the device is done."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from engine.batch import pinned
from engine.plan import StepPlan, StepResult
from engine.request import TokenLogprobs
from engine.sampling.logprobs import LogprobTensors, to_records


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Start a copy of `tensor` to the host. On CUDA the copy may be read once the step is done. On a CPU `tensor` is returned."""
    if not tensor.is_cuda:
        return tensor
    return pinned(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor, non_blocking=True)


class ReportedLogprobs(NamedTuple):
    """Log-probabilities of N positions. The values are on the host once the step is done."""

    slices: list[int]  # [N]: the slice of the plan that each position belongs to
    num_top: list[int]  # [N]: alternatives that each position reports
    values: LogprobTensors

    @staticmethod
    def of(slices: list[int], num_top: list[int], values: LogprobTensors) -> ReportedLogprobs:
        """Start copying `values` to the host, and return the log-probabilities with these copies."""
        return ReportedLogprobs(slices, num_top, LogprobTensors(*map(to_host, values)))

    def records(self) -> list[tuple[int, TokenLogprobs]]:
        """Return (slice of the plan, log-probabilities) of each position."""
        return list(zip(self.slices, to_records(self.values, self.num_top), strict=True))


class DeviceStep:
    """A step that was submitted to the device. Implements PendingStep.

    The runner fills in the results' tensors. Calls of `begins` and `submitted` mark the step's start and end in the CUDA stream.
    """

    def __init__(self, plan: StepPlan, *, on_cuda: bool, after: torch.cuda.Event | None) -> None:
        """`after` is the CUDA event at the end of the previous step, or None if there was no previous step."""
        self._plan = plan
        self._on_cuda = on_cuda
        self._after = after
        self._began: torch.cuda.Event | None = None
        self._began_at = 0.0  # seconds of perf_counter; only where the device is the CPU
        self._cpu_seconds = 0.0
        self.done: torch.cuda.Event | None = None
        self.tokens: torch.Tensor | None = None  # int64 token ids, on the host once the step is done
        self.tokens_of_all_slices = False  # `tokens` has one entry for every slice, not only for those that sample
        self.logprobs: ReportedLogprobs | None = None
        self.prompt_logprobs: ReportedLogprobs | None = None
        self.prompt_slices: list[int] = []  # slices of prompts whose log-probabilities are requested

    def begins(self) -> None:
        """Record the step's start. The runner calls it right before it submits the model's work."""
        if self._on_cuda:
            self._began = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._began.record()
        else:
            self._began_at = time.perf_counter()

    def submitted(self) -> None:
        """Record the step's end. The runner calls it once the whole step is submitted, copies to the host included."""
        if self._on_cuda:
            self.done = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self.done.record()
        else:
            self._cpu_seconds = time.perf_counter() - self._began_at  # a CPU has computed the step by now

    def result(self) -> StepResult:
        if self.done is not None:
            self.done.synchronize()
        result = StepResult(self._plan.step, self._sampled(), device_seconds=self._seconds())
        if self._after is not None and self._began is not None:
            result.idle_seconds = self._after.elapsed_time(self._began) / 1e3
        if self.logprobs is not None:
            failed = {s for s, token in zip(self._plan.samples, result.tokens, strict=True) if token < 0}
            result.logprobs = {s: record for s, record in self.logprobs.records() if s not in failed}
        result.prompt_logprobs = {s: [] for s in self.prompt_slices}
        if self.prompt_logprobs is not None:
            for s, record in self.prompt_logprobs.records():
                result.prompt_logprobs[s].append(record)
        return result

    def _seconds(self) -> float:
        """Return how long the device took for the step, once it is done."""
        if self._began is None or self.done is None:
            return self._cpu_seconds
        milliseconds: float = self._began.elapsed_time(self.done)
        return milliseconds / 1e3

    def _sampled(self) -> list[int]:
        tokens: list[int] = [] if self.tokens is None else self.tokens.tolist()
        return [tokens[s] for s in self._plan.samples] if self.tokens_of_all_slices else tokens
