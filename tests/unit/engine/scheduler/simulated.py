"""SimulatedServer: requests that arrive, a batch and a device made of numbers, on a clock that only the steps move.

It is the least that a controller needs around it. Requests run in the order of their arrivals.
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.scheduler.limits import Load, StepLimits, StepShape
from tests.unit.engine.scheduler.devices import Device


@dataclass(eq=False)
class Job:
    prompt: int
    outputs: int
    arrival: float
    itl: float | None = 0.05
    computed: int = 0
    first_at: float | None = None
    last_at: float = 0.0
    gap: float = 0.0

    @property
    def kv_tokens(self) -> int:
        return self.computed


@dataclass
class Step:
    at: float  # when it began
    seconds: float
    shape: StepShape
    limits: StepLimits
    load: Load


@dataclass
class SimulatedServer:
    """`limits_of(load, now)` and `observe(shape, seconds, now)` are a controller's. `now` is the simulated time."""

    controller: object
    device: Device
    now: float = 0.0
    waiting: deque[Job] = field(default_factory=deque)
    waiting_tokens: int = 0
    prompts: list[Job] = field(default_factory=list)
    decodes: list[Job] = field(default_factory=list)
    done: list[Job] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    changes: list[tuple[float, StepLimits]] = field(default_factory=list)

    def run(self, jobs: list[Job], until: float) -> None:
        """Run steps until the time `until`. `jobs` are in the order of their arrivals, and stay as they are."""
        arriving = deque(copy.copy(job) for job in jobs)
        while self.now < until:
            while arriving and arriving[0].arrival <= self.now:
                self.waiting.append(arriving.popleft())
                self.waiting_tokens += self.waiting[-1].prompt
            if not self.step():
                self.now = arriving[0].arrival if arriving else until

    def step(self) -> bool:
        if not (self.waiting or self.prompts or self.decodes):
            return False
        load = self.load()
        before = self.controller.present
        limits = self.controller.limits(load, self.now)
        if self.controller.present != before:
            self.changes.append((self.now, self.controller.present))
        slices = self.plan(limits)
        pairs = sum(job.computed * num + num * (num + 1) // 2 for job, num in slices)
        shape = StepShape(load.decodes, load.kv_tokens, sum(num for _, num in slices), pairs)
        assert shape.decodes or shape.prompt_tokens, "the limits leave nothing to run"
        seconds = self.device.seconds(shape)
        self.steps.append(Step(self.now, seconds, shape, limits, load))
        self.now += seconds
        self.commit(slices)
        self.controller.observe(shape, seconds, self.now)
        return True

    def load(self) -> Load:
        return Load(
            decodes=len(self.decodes),
            kv_tokens=sum(job.kv_tokens for job in self.decodes),
            running=len(self.decodes) + len(self.prompts),
            waiting=len(self.waiting),
            prompt_tokens=sum(job.prompt - job.computed for job in self.prompts) + self.waiting_tokens,
            context=self.prompts[0].computed if self.prompts else 0,
            itl=min((job.itl for job in self.decodes if job.itl is not None), default=None),
        )

    def plan(self, limits: StepLimits) -> list[tuple[Job, int]]:
        """Return the prompts of the step, each with the number of tokens that it computes."""
        slices: list[tuple[Job, int]] = []
        budget = limits.tokens - len(self.decodes)
        candidates = list(self.prompts)
        rows = limits.seqs - len(self.decodes) - len(self.prompts)
        candidates += [job for _, job in zip(range(max(0, rows)), self.waiting, strict=False)]
        for index, job in enumerate(candidates):
            chunk = limits.chunk if len(candidates) > 1 else budget
            num = min(job.prompt - job.computed, budget, chunk)
            if num <= 0:
                break
            slices.append((job, num))
            budget -= num
            if index >= len(self.prompts):
                assert self.waiting[0] is job
                self.waiting_tokens -= self.waiting.popleft().prompt
        self.prompts += [job for job, _ in slices if job not in self.prompts]
        return slices

    def commit(self, slices: list[tuple[Job, int]]) -> None:
        for job in self.decodes:
            job.computed += 1
            job.gap = max(job.gap, self.now - job.last_at)
            job.last_at = self.now
        for job, num in slices:
            job.computed += num
            if job.computed == job.prompt:
                job.first_at = job.last_at = self.now
                self.prompts.remove(job)
                self.decodes.append(job)
        ended = [job for job in self.decodes if job.computed >= job.prompt + job.outputs - 1]
        self.done += ended
        self.decodes = [job for job in self.decodes if job.computed < job.prompt + job.outputs - 1]


def chat_jobs(
    rate: Callable[[float], float], seconds: float, *, seed: int = 5, mu: float = 6.0, itl: float | None = 0.05
) -> list[Job]:
    """Return requests of chats that arrive at `rate(time)` a second, by chance."""
    rng = random.Random(seed)
    now, jobs = 0.0, []
    while (now := now + rng.expovariate(rate(now))) < seconds:
        prompt = int(min(4000, max(16, rng.lognormvariate(mu, 0.8))))
        jobs.append(Job(prompt, int(min(1024, max(8, rng.lognormvariate(5.3, 0.7)))), now, itl))
    return jobs


def step_percentile(steps: list[Step], share: float) -> float:
    """Return a percentile of the durations of steps that someone waits for: those with decodes."""
    seconds = sorted(step.seconds for step in steps if step.shape.decodes)
    return seconds[min(len(seconds) - 1, int(share * len(seconds)))]
