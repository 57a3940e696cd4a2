"""Controller: sets the limits of each step, so that the batch follows the measured times of steps.

    limits = controller.limits(scheduler.load(), now)                       before a step
    controller.observe(StepShape.of(plan), result.device_seconds, now)      once its result is known

A controller is pure: it reads no clock, and knows nothing of scheduler and runner.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from engine.config import EngineConfig
from engine.errors import InternalError
from engine.scheduler.limits import Load, StepLimits, StepShape


class Controller(Protocol):
    """`now` is in seconds of any clock that does not go back."""

    def limits(self, load: Load, now: float) -> StepLimits:
        """Return the limits of the next step."""
        ...

    def observe(self, shape: StepShape, seconds: float, now: float) -> None:
        """Learn that a step of `shape` took the device `seconds`. 0 means that the step was not measured."""
        ...

    @property
    def policy(self) -> str:
        """The policy in effect: fixed, aimd or model."""
        ...

    @property
    def present(self) -> StepLimits:
        """The limits in effect. A single step may get others, for example if nothing is decoding."""
        ...

    @property
    def changes(self) -> Mapping[str, int]:
        """How often the limits have changed, by reason."""
        ...

    @property
    def last_reason(self) -> str:
        """The reason of the last change. Empty if there was none."""
        ...


class FixedController:
    """The limits never change, and a prompt may fill a step."""

    policy = "fixed"
    last_reason = ""

    def __init__(self, limits: StepLimits) -> None:
        self.present = limits
        self.changes: Mapping[str, int] = {}

    def limits(self, load: Load, now: float) -> StepLimits:
        return self.present

    def observe(self, shape: StepShape, seconds: float, now: float) -> None:
        """Do nothing: the limits do not depend on times."""


def largest_limits(config: EngineConfig) -> StepLimits:
    """Return the limits that the settings allow at most."""
    tokens = config.scheduler.max_step_tokens
    if tokens is None:
        raise InternalError("the controller needs a resolved config")
    return StepLimits(tokens, config.scheduler.max_num_seqs, tokens)


def make_controller(config: EngineConfig) -> Controller:
    """Return the controller that the resolved `config` asks for."""
    return FixedController(largest_limits(config))
