"""Controller: sets the limits of each step, so that the batch follows the measured times of steps.

    limits = controller.limits(scheduler.load(), now)                       before a step
    controller.observe(StepShape.of(plan), result.device_seconds, now)      once its result is known

A controller is pure: it reads no clock, and knows nothing of scheduler and runner. `aimd.py` and `model_policy.py` have the two
policies that adapt.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

from engine.config import BatchingConfig, EngineConfig
from engine.errors import InternalError
from engine.scheduler.aimd import AimdPolicy
from engine.scheduler.changes import LimitChanges
from engine.scheduler.limits import Load, StepLimits, StepShape
from engine.scheduler.model_policy import ModelPolicy
from engine.scheduler.step_cost import StepCost

log = logging.getLogger(__name__)


class Controller(Protocol):
    """`now` is in seconds of any clock that does not go back."""

    def limits(self, load: Load, now: float) -> StepLimits:
        """Return the limits of the next step."""
        ...

    def observe(self, shape: StepShape, seconds: float, now: float) -> None:
        """Learn that a step of `shape` took the device `seconds`. 0 means that the step was too short to be measured."""
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
    def last_reason(self) -> str | None:
        """The reason of the last change, one of `engine.scheduler.changes.REASONS`. None if there was no change."""
        ...


class FixedController:
    """The limits never change, and a prompt may fill a step. `cost` learns what steps take, if it is given."""

    policy = "fixed"
    last_reason = None

    def __init__(self, limits: StepLimits, cost: StepCost | None = None) -> None:
        self.present = limits
        self.changes: Mapping[str, int] = {}
        self._cost = cost

    def limits(self, load: Load, now: float) -> StepLimits:
        return self.present

    def observe(self, shape: StepShape, seconds: float, now: float) -> None:
        if self._cost is not None:
            self._cost.observe(shape, seconds)


class AdaptiveController:
    """Follows the model policy as far as the step cost is trusted, and else AIMD. If `model` is False, AIMD always holds.

    A server that has just started has run few steps with prompts. Then the number of requests already follows the model, and the
    number of tokens still follows AIMD.
    """

    def __init__(self, largest: StepLimits, batching: BatchingConfig, cost: StepCost, *, model: bool) -> None:
        self._cost = cost
        self._changes = LimitChanges(largest)
        self._model = ModelPolicy(largest, cost, self._changes) if model else None
        self._aimd = AimdPolicy(largest, batching, self._changes)
        trusted = self._model is not None and cost.trusted
        self.policy = "model" if trusted else "aimd"
        self._changes.present = self._model.present if self._model is not None and trusted else self._aimd.present

    @property
    def present(self) -> StepLimits:
        return self._changes.present

    @property
    def changes(self) -> Mapping[str, int]:
        return self._changes.counts

    @property
    def last_reason(self) -> str | None:
        return self._changes.last_reason

    def limits(self, load: Load, now: float) -> StepLimits:
        if self._model is None:
            return self._aimd.limits(load, now)
        if self._cost.trusted_for_decodes is not (self.policy == "model"):
            self._switch(self._model, now)
        if self.policy == "aimd":
            return self._aimd.limits(load, now)
        if self._cost.trusted:
            return self._model.limits(load, now)
        reason = self._aimd.adjust_tokens(load, now)
        limits = self._model.limits(load, now, self._aimd.present.tokens)
        if reason is not None:
            self._changes.set(self._model.present, reason, now)
        return limits

    def observe(self, shape: StepShape, seconds: float, now: float) -> None:
        self._cost.observe(shape, seconds)
        self._aimd.observe(shape, seconds, now)

    def _switch(self, model: ModelPolicy, now: float) -> None:
        trusted = self._cost.trusted_for_decodes
        self.policy = "model" if trusted else "aimd"
        log.info(
            "policy of the batch changed",
            extra={
                "policy": self.policy,
                "step_cost": "trusted" if trusted else "not trusted",
                "error": self._cost.error,
            },
        )
        if trusted:
            model.start_at(self.present, now)
        else:
            self._aimd.start_at(self.present, now)


def largest_limits(config: EngineConfig) -> StepLimits:
    """Return the limits that the settings allow at most."""
    tokens = config.scheduler.max_step_tokens
    if tokens is None:
        raise InternalError("the controller needs a resolved config")
    return StepLimits(tokens, config.scheduler.max_num_seqs, tokens)


def make_controller(config: EngineConfig, cost: StepCost) -> Controller:
    """Return the controller that the resolved `config` asks for. It teaches `cost`, unless the engine is offline."""
    largest, policy = largest_limits(config), config.batching.policy
    if config.offline:
        return FixedController(largest)
    if policy == "fixed":
        return FixedController(largest, cost)
    return AdaptiveController(largest, config.batching, cost, model=policy != "aimd")
