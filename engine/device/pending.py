"""A submitted step: what of it is on its way to the host, and what becomes of that once it is there."""

from __future__ import annotations

from typing import NamedTuple

import torch

from engine.plan import StepResult
from engine.sampling.logprobs import LogprobTensors, to_records


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host, on its way: it may be read once the step is done."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class Reported(NamedTuple):
    slices: list[int]  # of the plan, one for each position
    num_top: list[int]
    values: LogprobTensors  # on the host, once the step is done


class Pending:
    """PendingStep. Who submits the step fills it in; `begins` and `submitted` mark its place in the device's stream."""

    def __init__(self, step: int, *, on_cuda: bool, after: torch.cuda.Event | None) -> None:
        """`after`: the end of the step before, on CUDA."""
        self._step = step
        self._on_cuda = on_cuda
        self._after = after
        self._began: torch.cuda.Event | None = None
        self.done: torch.cuda.Event | None = None
        self.tokens: torch.Tensor | None = None
        self.sampling: list[int] | None = None  # which of `tokens` count; None: all
        self.logprobs: Reported | None = None
        self.prompt_logprobs: Reported | None = None
        self.prompt_slices: list[int] = []

    def begins(self) -> None:
        """The next thing in the stream is the model's."""
        if self._on_cuda:
            self._began = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._began.record()

    def submitted(self) -> None:
        """All of the step, copies to the host included, is in the stream."""
        if self._on_cuda:
            self.done = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self.done.record()

    def result(self) -> StepResult:
        if self.done is not None:
            self.done.synchronize()
        tokens: list[int] = [] if self.tokens is None else self.tokens.tolist()
        if self.sampling is not None:
            tokens = [tokens[i] for i in self.sampling]
        result = StepResult(self._step, tokens, {}, {})
        if self._after is not None and self._began is not None:
            result.idle_seconds = self._after.elapsed_time(self._began) / 1e3
        if self.logprobs is not None:
            records = to_records(self.logprobs.values, self.logprobs.num_top)
            result.logprobs = dict(zip(self.logprobs.slices, records, strict=True))
        result.prompt_logprobs = {s: [] for s in self.prompt_slices}
        if self.prompt_logprobs is not None:
            records = to_records(self.prompt_logprobs.values, self.prompt_logprobs.num_top)
            for s, record in zip(self.prompt_logprobs.slices, records, strict=True):
                result.prompt_logprobs[s].append(record)
        return result
