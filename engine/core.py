"""Core: one engine in one process, a scheduler and a runner joined by a step of three calls.

    plan = scheduler.schedule()              who runs, how many tokens, in which blocks
    pending = runner.submit(plan)            the device starts
    events = scheduler.commit(plan, pending.result())

With overlap, the step just submitted stays in one in-flight slot, and what is committed is the one before it: its tokens
reach the CPU while the device is at work on the next. The loop without overlap is its plain twin: same tokens.

Needs no torch itself; the runner that was chosen is imported by `build_core`.
"""

from __future__ import annotations

import importlib
import os
import time
from pathlib import Path
from typing import NamedTuple

import msgspec

from engine import logs
from engine.config import EngineConfig
from engine.errors import InternalError
from engine.messages import EngineInfo, EngineStats, Submit, check_submit
from engine.plan import BuiltRunner, PendingStep, StepPlan
from engine.request import Request, TokenEvent
from engine.scheduler.scheduler import Scheduler
from engine.startup import StartupClock

RUNNERS = {"torch": "engine.device.build", "fake": "engine.fake"}


class _Submitted(NamedTuple):
    plan: StepPlan
    pending: PendingStep
    followed: bool  # it was submitted while another was under way: what the device waited for it, we could have hidden


class Core:
    """Not thread-safe: one loop owns it.

    An exception out of `step` is a bug or a lost device. The core is then of no use, and nothing here catches it: the
    process dies with it, the supervisor starts another, and the workers submit their requests again.
    """

    def __init__(self, built: BuiltRunner) -> None:
        self.startup: dict[str, float] = {}  # seconds by phase, for `info`; who builds a core knows them
        self._runner = built.runner
        self._config = built.config
        self._device = built.device
        self._limits = msgspec.structs.replace(
            built.limits, max_model_len=built.config.max_model_len or built.limits.max_model_len
        )
        self._scheduler = Scheduler(built.config, built.runner.num_blocks)
        self._in_flight: _Submitted | None = None
        self._ended: list[TokenEvent] = []  # by abort, told with the next step
        self._step_seconds = 0.0
        self._exposed_seconds = 0.0

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to say."""
        return self._scheduler.has_requests or self._in_flight is not None or bool(self._ended)

    def submit(self, submit: Submit) -> None:
        """Accept a request, or raise InvalidRequest, ContextTooLong or Overloaded: then it never existed."""
        check_submit(submit, self._limits)
        self._scheduler.add(
            Request(
                submit.request_id,
                submit.prompt + submit.outputs,
                submit.params,
                num_prompt=len(submit.prompt),
                seed=submit.seed,
                eos_token_ids=self._limits.eos_token_ids,
                max_model_len=self._limits.max_model_len,
                priority=submit.priority,
                arrival=time.monotonic(),
                fork_of=submit.fork_of,
                salt=submit.salt,
            )
        )

    def abort(self, request_id: str) -> None:
        """End a request; its terminal event comes with the next step. A request that is not under way is left alone."""
        event = self._scheduler.abort(request_id)
        if event is not None:
            self._ended.append(event)

    def step(self) -> list[TokenEvent]:
        """Run one step and return what became known; with overlap that is the step before."""
        began = time.perf_counter()
        events, self._ended = self._ended, []
        events += self._overlapped_step(began) if self._config.overlap else self._plain_step(began)
        if self._config.debug_checks:
            self._scheduler.check()
        self._step_seconds += time.perf_counter() - began
        return events

    def prepare(self) -> bool:
        """While there is no work: do a piece of what later steps will want. It may take as long as a large step, or seconds where
        kernels are compiled. False: nothing is left to do."""
        return not self.has_work and self._runner.prepare()

    def stats(self) -> EngineStats:
        scheduler, cache, counts = self._scheduler, self._scheduler.cache, self._scheduler.counts
        return EngineStats(
            step=scheduler.step,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            blocks_used=cache.num_used,
            blocks_cached=cache.num_cached,
            blocks_total=cache.num_blocks,
            num_accepted=counts.num_accepted,
            num_finished=counts.num_finished,
            num_aborted=counts.num_aborted,
            num_preemptions=counts.num_preemptions,
            prompt_tokens=counts.prompt_tokens,
            cached_tokens=counts.cached_tokens,
            output_tokens=counts.output_tokens,
            log_lines_dropped=logs.num_dropped(),
            step_seconds=self._step_seconds,
            exposed_cpu_seconds=self._exposed_seconds,
        )

    def info(self) -> EngineInfo:
        return EngineInfo(
            model=Path(self._config.model).resolve().name,
            limits=self._limits,
            block_size=self._config.cache.block_size,
            num_blocks=self._runner.num_blocks,
            max_num_seqs=self._config.scheduler.max_num_seqs,
            max_step_tokens=self._config.scheduler.max_step_tokens or 0,
            device=self._device,
            pid=os.getpid(),
            startup=self.startup,
        )

    def close(self) -> None:
        """Let go of the device. Requests under way get no event from here: who submitted them still has them whole."""
        self._in_flight = None
        self._runner.close()

    def _plain_step(self, began: float) -> list[TokenEvent]:
        plan = self._scheduler.schedule()
        if plan is None:
            return self._nothing_to_run()
        pending = self._runner.submit(plan)
        self._exposed_seconds += time.perf_counter() - began
        result = pending.result()
        known = time.perf_counter()
        events = self._scheduler.commit(plan, result)
        self._exposed_seconds += time.perf_counter() - known
        return events

    def _overlapped_step(self, began: float) -> list[TokenEvent]:
        previous = self._in_flight
        plan = self._scheduler.schedule()
        self._in_flight = None if plan is None else _Submitted(plan, self._runner.submit(plan), previous is not None)
        if previous is None:
            self._exposed_seconds += time.perf_counter() - began
            return [] if plan is not None else self._nothing_to_run()
        result = previous.pending.result()
        known = time.perf_counter()
        events = self._scheduler.commit(previous.plan, result)
        if previous.followed:
            self._exposed_seconds += result.idle_seconds
        if self._in_flight is None:
            self._exposed_seconds += time.perf_counter() - known
        return events

    def _nothing_to_run(self) -> list[TokenEvent]:
        if self._scheduler.has_requests:
            raise InternalError("requests are under way, nothing is in flight, and none of them can run")
        return []


def build_core(config: EngineConfig, clock: StartupClock | None = None) -> Core:
    """Import the runner that `config` names, build it and put a scheduler on it. `clock` may have run since before."""
    clock = clock or StartupClock()
    module = importlib.import_module(RUNNERS[config.runner])
    clock.end("imports")
    core = Core(module.build(config, clock))
    clock.end("ready")
    core.startup = clock.seconds
    return core
