"""Simulates an engine on a simulated clock: the real Core with its scheduler, controller and forecast, on a FakeRunner. Its steps
take the times of a cost file.

Network and API workers are not simulated. The device is idle for `between` seconds before each step.
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from engine.config import BatchingConfig, BatchingPolicy, CacheConfig, EngineConfig, FakeConfig, ModelLimits, SchedulerConfig
from engine.core import Core
from engine.errors import TidegateError
from engine.fake import build_fake
from engine.fake_device import SimulatedDevice, SimulatedTime
from engine.messages import EngineStats, Submit
from engine.plan import StepPlan
from engine.request import FinishReason, SamplingParams
from engine.scheduler.cost_table import CostTable
from server.bench.loads import Arrival

# Seconds in which the device is idle before each step. docs/batching.md compares simulations with an H200: with less, first
# tokens come too early, and with more, the times between tokens are too long. An offline engine has 0.05 ms.
BETWEEN = 0.3e-3
SAMPLE_SECONDS = 0.05  # simulated time between two looks at the limits
_TOKEN = 10
_LIMITS = ModelLimits(max_model_len=131_072, vocab_size=1 << 30, eos_token_ids=(), dtype="bfloat16")


class Machine(NamedTuple):
    """One simulated replica. `costs` is the cost file of the device, and `believed` that from which the controller predicts.

    With `cold`, the controller has no file, and learns the costs while it serves.
    """

    costs: str | Path
    believed: str | Path | None = None  # None: the same file
    cold: bool = False
    policy: BatchingPolicy = "auto"
    max_num_seqs: int = 256
    max_step_tokens: int = 8192
    kv_tokens: int = 832_000  # what 0.9 of an H200's memory holds beside llama-8b
    between: float = BETWEEN
    noise: float = 0.02  # standard deviation of the logarithm of a step's duration
    prefix_caching: bool = True

    def config(self) -> EngineConfig:
        block_size = CacheConfig().block_size
        believed = None if self.cold else str(self.believed or self.costs)
        return EngineConfig(
            model="simulated",
            device="cuda",
            runner="fake",
            overlap=True,
            max_model_len=min(_LIMITS.max_model_len, self.kv_tokens),
            cache=CacheConfig(num_blocks=-(-self.kv_tokens // block_size), prefix_caching=self.prefix_caching),
            scheduler=SchedulerConfig(max_num_seqs=self.max_num_seqs, max_step_tokens=self.max_step_tokens),
            batching=BatchingConfig(policy=self.policy, cost_file=believed),
            fake=FakeConfig(cost_file=str(self.costs)),
        )


class Served:
    """What became of one request. Times are in simulated seconds since the begin of the load."""

    __slots__ = ("arrival", "finish", "first", "gaps", "last", "refused", "refused_at", "retry_after")

    def __init__(self, arrival: Arrival) -> None:
        self.arrival = arrival
        self.first: float | None = None  # when its first token came
        self.last = 0.0  # when its latest token came
        self.gaps = array("d")  # seconds between two tokens
        self.finish: FinishReason | None = None
        self.refused: str | None = None  # the error's code, if it was refused
        self.refused_at = 0.0
        self.retry_after: float | None = None

    @property
    def ok(self) -> bool:
        return self.finish in (FinishReason.LENGTH, FinishReason.STOP)

    @property
    def ttft(self) -> float:
        return (self.first or 0.0) - self.arrival.at

    @property
    def longest_gap(self) -> float:
        return max(self.gaps, default=0.0)

    @property
    def e2e(self) -> float:
        return self.last - self.arrival.at

    @property
    def tpot(self) -> float:
        """Mean time between two tokens."""
        return sum(self.gaps) / len(self.gaps) if self.gaps else 0.0

    def good(self, ttft: float, gap: float) -> bool:
        return self.ok and self.in_time(ttft, gap)

    def in_time(self, ttft: float, gap: float) -> bool:
        """Return whether the first token and all later ones so far came in time. The request need not have ended."""
        return self.first is not None and self.ttft <= ttft and self.longest_gap <= gap


class SimulatedStep(NamedTuple):
    at: float  # when it was submitted
    seconds: float
    decodes: int
    prompt_tokens: int


class Sample(NamedTuple):
    at: float
    stats: EngineStats


class Run(NamedTuple):
    served: list[Served]
    steps: list[SimulatedStep]
    samples: list[Sample]  # one for each SAMPLE_SECONDS with work
    seconds: float  # simulated
    cpu_seconds: float

    @property
    def busy(self) -> float:
        """The share of the time in which the device ran a step."""
        return sum(step.seconds for step in self.steps) / self.seconds if self.seconds else 0.0


class _RecordingDevice(SimulatedDevice):
    def __init__(self, config: FakeConfig, costs: CostTable | None, time: SimulatedTime, machine: Machine, seed: int) -> None:
        super().__init__(config, costs, time.clock, time.sleep, between=machine.between, noise=machine.noise, seed=seed)
        self.steps: list[SimulatedStep] = []
        self._time = time

    def seconds(self, plan: StepPlan) -> float:
        seconds = super().seconds(plan)
        self.steps.append(SimulatedStep(self._time.now, seconds, plan.num_decodes, plan.num_tokens - plan.num_decodes))
        return seconds


class _Simulation:
    def __init__(self, machine: Machine, seed: int) -> None:
        self.time = SimulatedTime()
        self.steps: list[SimulatedStep] = []
        config = machine.config()
        built = build_fake(config, _LIMITS, make_device=partial(self._make_device, machine, seed), only_token=_TOKEN)
        self.core = Core(built, clock=self.time.clock)
        self.served: list[Served] = []
        self.samples: list[Sample] = []
        self._by_id: dict[str, Served] = {}
        self._deadlines: list[tuple[float, str]] = []

    def _make_device(self, machine: Machine, seed: int, config: FakeConfig, costs: CostTable | None) -> SimulatedDevice:
        device = _RecordingDevice(config, costs, self.time, machine, seed)
        self.steps = device.steps
        return device

    def submit(self, arrival: Arrival) -> None:
        served, name = Served(arrival), str(len(self.served))
        self.served.append(served)
        client = arrival.client
        request = Submit(
            request_id=name,
            prompt=arrival.prompt.tobytes(),
            params=SamplingParams(max_tokens=arrival.num_outputs, temperature=0.0, ignore_eos=True),
            seed=0,
            tenant=client.tenant,
            slo=client.slo,
            promised=client.promised,
            deadline_s=client.deadline_s,
        )
        try:
            self.core.submit(request)
        except TidegateError as error:
            served.refused, served.refused_at = error.code, self.time.now
            served.retry_after = getattr(error, "retry_after", None)
            return
        self._by_id[name] = served
        if client.deadline_s is not None:
            self._deadlines.append((arrival.at + client.deadline_s, name))

    def step(self) -> None:
        events, now = self.core.step(), self.time.now
        for event in events:
            served = self._by_id[event.request_id]
            if event.tokens:
                if served.first is None:
                    served.first = now
                else:
                    served.gaps.append(now - served.last)
                served.last = now
            if event.finish is not None:
                served.finish = event.finish
                del self._by_id[event.request_id]

    def end_late(self) -> None:
        """Abort the requests whose deadline has passed, as an API worker does."""
        if self._deadlines:
            late = [name for at, name in self._deadlines if at <= self.time.now]
            self._deadlines = [entry for entry in self._deadlines if entry[0] > self.time.now]
            for name in late:
                self.core.abort(name)

    def sample(self) -> None:
        if not self.samples or self.time.now >= self.samples[-1].at + SAMPLE_SECONDS:
            self.samples.append(Sample(self.time.now, self.core.stats()))


def simulate(arrivals: Iterable[Arrival], machine: Machine, *, seed: int = 0, until: float = math.inf) -> Run:
    """Run all `arrivals`, which are in order of time, on one replica: to their end, or to the simulated time `until`.

    `seed` decides the noise of the steps. A request that has not ended by `until` has no `finish`.

    Raises ConfigError if a cost file cannot be used.
    """
    began = time.process_time()
    simulation, source = _Simulation(machine, seed), iter(arrivals)
    clock, core = simulation.time, simulation.core
    upcoming = next(source, None)
    while clock.now < until and (core.has_work or upcoming is not None):
        if not core.has_work and upcoming is not None:
            clock.now = max(clock.now, upcoming.at)
        while upcoming is not None and upcoming.at <= clock.now:
            simulation.submit(upcoming)
            upcoming = next(source, None)
        simulation.end_late()
        if core.has_work:
            simulation.step()
            simulation.sample()
    return Run(simulation.served, simulation.steps, simulation.samples, clock.now, time.process_time() - began)


def limits_over_time(run: Run) -> list[dict[str, Any]]:
    """Return the limits at each sample at which they differ from the sample before."""
    names = ("seq_limit", "token_limit", "chunk_limit", "batching")
    found: list[dict[str, Any]] = []
    for at, stats in run.samples:
        values = {name: getattr(stats, name) for name in names}
        if not found or values != {name: found[-1][name] for name in names}:
            found.append({"at": round(at, 3), **values})
    return found
