"""Defines the plan of a training run: frozen numbers for steps, tokens per step, learning rate, and window lengths."""

from __future__ import annotations

import msgspec


class Phase(msgspec.Struct, frozen=True):
    """Describes a part of a training run: from `start` (a share of the run's steps) on, windows have `length` tokens."""

    start: float
    length: int


class Share(msgspec.Struct, frozen=True):
    """Describes the work of one device in a step: the number of forwards, and the tokens of each forward."""

    forwards: int
    tokens: int


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Holds the numbers of a training run. Raises ValueError if they contradict each other.

    The learning rate warms up linearly, stays constant, and decays linearly to zero over the last `decay` of the run (WSD: S. Hu
    et al., MiniCPM, arXiv 2404.06395).
    """

    steps: int
    tokens_per_step: int  # tokens in one step, summed over all devices
    micro_tokens: int  # most tokens in one forward on one device; a step accumulates the gradients of several forwards
    lr: float
    phases: tuple[Phase, ...]
    warmup: int = 100  # steps of the learning rate's warm-up
    decay: float = 0.35  # share of the run's steps in which the learning rate decays
    clip: float = 1.0  # norm above which the gradient is scaled down
    seed: int = 2026
    log_every: int = 20  # steps between log lines
    measure_every: int = 500  # steps between measurements of the held-out loss
    save_every: int = 1000  # steps between saves

    def __post_init__(self) -> None:
        if not self.phases or self.phases[0].start != 0.0 or list(self.phases) != sorted(self.phases, key=lambda p: p.start):
            raise ValueError("phases must start at 0 and be in order")
        for phase in self.phases:
            if self.micro_tokens % phase.length or self.tokens_per_step % self.micro_tokens:
                raise ValueError(
                    f"tokens_per_step ({self.tokens_per_step}) must be a multiple of micro_tokens ({self.micro_tokens}), and "
                    f"that of each phase's length ({phase.length})"
                )

    def with_steps(self, steps: int, **changes: float) -> Plan:
        return msgspec.structs.replace(self, steps=steps, **changes)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step `step`. The first step is 0."""
        return self.lr * min((step + 1) / self.warmup, 1.0, self.left_of_decay(step))

    def left_of_decay(self, step: int) -> float:
        """Return the factor of the learning rate's decay at `step`: 1 until the decay begins, then down to nearly 0."""
        return min((self.steps - step) / (self.decay * self.steps), 1.0)

    def phase(self, step: int) -> tuple[Phase, int]:
        """Return the phase that `step` belongs to, and the first step of that phase."""
        begun = [(p, round(p.start * self.steps)) for p in self.phases]
        return [(p, first) for p, first in begun if first <= step][-1]

    def share(self, num_devices: int) -> Share:
        """Return one device's part of a step. Raises ValueError if a step cannot be divided among `num_devices` devices."""
        each, odd = divmod(self.tokens_per_step, num_devices)
        tokens = min(self.micro_tokens, each)
        if odd or each % tokens or any(tokens % phase.length for phase in self.phases):
            raise ValueError(
                f"{self.tokens_per_step} tokens a step cannot be shared out among {num_devices} devices in whole windows of "
                f"{' and '.join(str(phase.length) for phase in self.phases)} tokens"
            )
        return Share(forwards=each // tokens, tokens=tokens)
