"""The device that FakeRunner simulates: how long its steps and moves take, by the real clock or by a simulated one."""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable

from engine.config import FakeConfig
from engine.plan import Arrival, Place, StepPlan
from engine.scheduler.cost_table import CostTable
from engine.scheduler.limits import StepShape


class SimulatedTime:
    """A clock that moves only by `sleep`, in no real time. Pass both methods to FakeRunner."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class SimulatedDevice:
    """Runs one step after the other, by a clock. A step takes what `costs` predicts, or else what `simulated` says.

    The device is idle for `between` seconds before each step. With `noise`, the logarithm of a duration has this standard
    deviation; its mean is 0, and the same seed gives the same durations.
    """

    def __init__(
        self,
        simulated: FakeConfig,
        costs: CostTable | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        *,
        between: float = 0.0,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._simulated = simulated
        self._costs = costs
        self._clock, self._sleep = clock, sleep
        self._between, self._noise = between, noise
        self._gauss = random.Random(seed).gauss
        self._free_at = 0.0

    def seconds(self, plan: StepPlan) -> float:
        """Return how long a step takes. A plan that only copies blocks takes no time."""
        if not plan.rows:
            return 0.0
        if self._costs is None:
            seconds = self._simulated.step_ms / 1e3 + self._simulated.token_us / 1e6 * plan.num_tokens
        else:
            seconds = self._costs.predict(StepShape.of(plan))
        return seconds * math.exp(self._gauss(0.0, self._noise)) if self._noise else seconds

    def submit(self, seconds: float) -> float:
        """Add a step that takes `seconds`. Returns when it ends; 0 means at once."""
        if seconds == 0.0:
            return 0.0
        self._free_at = max(self._clock(), self._free_at) + self._between + seconds
        return self._free_at

    def wait(self, until: float) -> None:
        """Wait for a step that ends at the time `until`."""
        if until:
            wait = until - self._clock()
            if wait > 0:
                self._sleep(wait)

    def after_steps(self, free_at: float, seconds: float) -> float:
        """Return when work of `seconds` ends that begins after all steps so far, and not before `free_at`."""
        return max(self._clock(), self._free_at, free_at) + seconds

    def wait_until(self, at: float, most: float) -> bool:
        """Wait until the time `at`, for `most` seconds at most. Returns whether it has come."""
        wait = at - self._clock()
        if wait > 0:
            self._sleep(min(wait, most))
        return at <= self._clock()


class SimulatedMoves:
    """The moves of plans between tiers, one after the other over one link, and beside the steps. Some of them fail."""

    def __init__(self, simulated: FakeConfig, device: SimulatedDevice) -> None:
        self.block_seconds = simulated.block_bytes / (simulated.host_gb_s * 1e9) if simulated.host_gb_s else 0.0
        self._failing = simulated.failing_moves
        self._random = random.Random(0).random
        self._device = device
        self._free_at = 0.0
        self._under_way: deque[tuple[float, Place]] = deque()  # when it ends, and its destination

    def submit(self, plan: StepPlan) -> None:
        for copy in plan.copies:
            if copy.is_move:
                self._free_at = self._device.after_steps(self._free_at, self.block_seconds) if self.block_seconds else 0.0
                self._under_way.append((self._free_at, copy.dst))

    def poll(self, seconds: float) -> list[Arrival]:
        """Return the moves that have ended, after a wait of at most `seconds` for the first."""
        arrivals: list[Arrival] = []
        while self._under_way and self._device.wait_until(self._under_way[0][0], 0.0 if arrivals else seconds):
            _, dst = self._under_way.popleft()
            arrivals.append(Arrival(dst, self._random() >= self._failing))
        return arrivals
