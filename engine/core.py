"""Core: one engine in one process. It joins a scheduler and a runner by a step of four calls.

    limits = controller.limits(load)         how large the step may be
    plan = scheduler.schedule(limits)        which requests run, how many tokens, in which blocks
    pending = runner.submit(plan)            the device starts
    events = scheduler.commit(plan, pending.result())

With overlap, `step` submits step N+1 and then commits step N, so step N's tokens reach the CPU while the device runs step
N+1. Without overlap, `step` submits and commits the same step. Both loops generate the same tokens.

This module needs no torch. `build_core` imports the runner that the config names.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import msgspec

from engine import logs
from engine.config import EngineConfig
from engine.errors import InternalError
from engine.kvcache.open_tiers import open_tiers
from engine.messages import EngineInfo, EngineStats, Submit, TierName, check_submit, unpack_tokens
from engine.plan import BuiltRunner, PendingStep, StepPlan, StepResult, Tier
from engine.request import Request, TokenEvent
from engine.scheduler.controller import make_controller
from engine.scheduler.cost_file import cost_key, seeded_cost
from engine.scheduler.cost_folder import CostKeeper, LearntCosts
from engine.scheduler.limits import StepLimits, StepShape
from engine.scheduler.scheduler import Scheduler
from engine.startup import Progress, StartupClock, no_report

POLL_SECONDS = 0.005  # longest wait for a move between tiers while no request can run; the caller reads its socket in between
# When the engine ends. The supervisor kills it 5 seconds after it asked for the end.
SAVE_SECONDS = 3.0  # to write blocks to the disk tier
CLOSE_SECONDS = 1.0  # then, to end what the disk tier still does
RUNNERS = {"torch": "engine.device.build", "fake": "engine.fake"}


class _InFlightStep(NamedTuple):
    """A step that the core has submitted to the runner, and whose result the scheduler has not applied yet."""

    plan: StepPlan
    pending: PendingStep
    followed: bool  # submitted while another step was in flight, so device idle time before it counts as exposed CPU time


class Core:
    """Runs a scheduler and a runner step by step. A Core is not thread-safe: one loop calls all its methods.

    Arrivals, deadlines and the controller go by `clock`, which may be simulated. The CPU time of steps is always measured.

    An exception from `step` is a bug or a lost device, and the core cannot be used after it. The core does not catch it: the
    process ends, the supervisor starts another engine, and the workers submit their requests again.
    """

    def __init__(self, built: BuiltRunner, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.startup: dict[str, float] = {}  # seconds of each start-up phase, reported by `info`; set by `build_core`
        self._clock = clock
        self._runner = built.runner
        self._config = built.config
        self._device = built.device
        self._limits = msgspec.structs.replace(
            built.limits, max_model_len=built.config.max_model_len or built.limits.max_model_len
        )
        key, batching = cost_key(built.config, built.device), built.config.batching
        learnt = None if batching.cost_folder is None or built.config.offline else LearntCosts(batching.cost_folder, key)
        cost = seeded_cost(built.config, key, learnt.read() if learnt is not None and batching.cost_file is None else None)
        self._keeper = None if learnt is None else CostKeeper(cost, learnt, clock)
        self._controller = make_controller(built.config, cost)
        tiers = open_tiers(built, clock)
        self._disk = tiers.disk
        self._record_bytes = 0 if built.host is None else built.host.record_bytes
        self._scheduler = Scheduler(
            built.config,
            built.runner.num_blocks,
            cost=cost,
            clock=clock,
            kv=built.kv,
            host_slots=0 if built.host is None else built.host.num_slots,
            disk=tiers.disk,
            identity=tiers.identity,
        )
        self._in_flight: _InFlightStep | None = None
        self._ended: list[TokenEvent] = []  # events of aborted requests; the next `step` returns them
        self._step_seconds = 0.0
        self._exposed_seconds = 0.0
        self._device_seconds = 0.0
        self._latest_shape = StepShape(0, 0, 0, 0)  # of the latest step whose result is known

    @property
    def has_work(self) -> bool:
        """True if `step` must be called: there are requests, a submitted step without a result, moves between the device and the
        host that are not known to have ended, or events to return."""
        scheduler = self._scheduler
        return scheduler.has_requests or self._in_flight is not None or bool(self._ended) or scheduler.cache.num_moving > 0

    @property
    def tends(self) -> bool:
        """True if the disk tier has work under way or to begin, so that `tend` should be called soon even without other work."""
        return self._scheduler.cache.tiers.has_work

    @property
    def num_committed_steps(self) -> int:
        """Steps that have ended, with their tokens committed. A step in flight is not among them."""
        return self._scheduler.step - (self._in_flight is not None)

    def submit(self, submit: Submit) -> None:
        """Accept a request. Raises InvalidRequest, ContextTooLong or Overloaded if it is refused; it is then not counted."""
        check_submit(submit, self._limits)
        if not self._scheduler.has_prompts:  # the limits of a step that could only decode say nothing about a prompt
            self._scheduler.limits = self._controller.limits(self._scheduler.load(), self._clock())
        self._scheduler.add(
            Request(
                submit.request_id,
                unpack_tokens(submit.prompt + submit.outputs),
                submit.params,
                num_prompt=submit.num_prompt,
                seed=submit.seed,
                eos_token_ids=self._limits.eos_token_ids,
                max_model_len=self._limits.max_model_len,
                priority=submit.priority,
                arrival=self._clock(),
                fork_of=submit.fork_of,
                salt=submit.salt,
                tenant=submit.tenant,
                slo=submit.slo,
                promised=submit.promised,
                deadline_s=submit.deadline_s,
            ),
            resumed=submit.resumed,
        )

    def abort(self, request_id: str) -> None:
        """End a request. The next `step` returns its terminal event. Unknown ids are ignored."""
        event = self._scheduler.abort(request_id)
        if event is not None:
            self._ended.append(event)

    def forget(self, request_ids: Collection[str]) -> None:
        """End requests without any further event, including events of earlier aborts that `step` has not returned yet.

        The ids can be submitted again at once.
        """
        for request_id in request_ids:
            self._scheduler.abort(request_id)
        self._ended = [event for event in self._ended if event.request_id not in request_ids]

    def reset_cache(self, tiers: Collection[TierName]) -> dict[TierName, int]:
        """Forget all blocks that `tiers` have of prefixes. Running requests go on. Returns how many blocks each tier had."""
        by_tier = {Tier[name.upper()]: name for name in tiers}
        return {by_tier[tier]: num for tier, num in self._scheduler.cache.reset(by_tier.keys()).items()}

    def step(self) -> list[TokenEvent]:
        """Run one step and return its events. With overlap, the events are those of the previous step."""
        began = time.perf_counter()
        events, self._ended = self._ended, []
        if self._scheduler.cache.num_moving:
            self._scheduler.arrived(self._runner.poll())
        self.tend()
        events += self._overlapped_step(began) if self._config.overlap else self._plain_step(began)
        if self._config.debug_checks:
            self._scheduler.check()
        self._step_seconds += time.perf_counter() - began
        return events

    def tend(self) -> None:
        """Take over what the disk tier has done, and give it work. `step` does so too; an idle caller does it often."""
        if self._disk is not None:
            self._scheduler.tend()

    def find_records(self, seconds: float, progress: Progress = no_report) -> None:
        """Wait until the disk tier has found what earlier engines left there, for `seconds` at most. The rest is found later.

        The first requests then find their prefixes.
        """
        until = time.monotonic() + seconds
        while self._disk is not None and self._disk.is_looking and time.monotonic() < until:
            self._scheduler.tend(POLL_SECONDS)
            progress()

    def prepare(self) -> bool:
        """If there is no work, let the runner do one piece of preparation for later steps.

        One piece may take as long as a large step, or seconds if kernels are compiled. Returns False if there is work, or if
        nothing is left to prepare.
        """
        return not self.has_work and self._runner.prepare()

    def keep_costs(self) -> None:
        """Write the learnt step costs to their file if it is time. A caller that runs for long calls this often."""
        if self._keeper is not None:
            self._keeper.keep()

    def stats(self) -> EngineStats:
        scheduler, cache, counts = self._scheduler, self._scheduler.cache, self._scheduler.counts
        limits, forecast = self._controller.present, scheduler.forecast
        return EngineStats(
            step=scheduler.step,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            loading=cache.num_waiting_loads,
            blocks_used=cache.num_used,
            blocks_cached=cache.num_cached,
            blocks_total=cache.num_blocks,
            num_accepted=counts.num_accepted,
            num_finished=counts.num_finished,
            num_aborted=counts.num_aborted,
            num_failed=counts.num_failed,
            num_preemptions=counts.num_preemptions,
            prompt_tokens=counts.prompt_tokens,
            cached_tokens=counts.cached_tokens,
            output_tokens=counts.output_tokens,
            log_lines_dropped=logs.num_dropped(),
            kernels_compiled=self._runner.num_compiled,
            step_seconds=self._step_seconds,
            exposed_cpu_seconds=self._exposed_seconds,
            device_seconds=self._device_seconds,
            seq_limit=limits.seqs,
            token_limit=limits.tokens,
            chunk_limit=limits.chunk,
            batching=self._controller.policy,
            limit_changes=dict(self._controller.changes),
            work_seconds=forecast.waiting_seconds(limits),
            predicted_ttft_over_target=forecast.ttft_over_target(limits),
            predicted_itl_over_target=forecast.itl_over_target(self._latest_shape),
            tiers=cache.tiers.stats(
                self._record_bytes, {Tier.HOST: counts.host_cached_tokens, Tier.DISK: counts.disk_cached_tokens}
            ),
            load_decisions={str(decision): num for decision, num in cache.tiers.decisions.items()},
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
        """Write what the disk tier is to keep, for SAVE_SECONDS at most, release the device, and write the learnt step costs.

        Running and waiting requests get no event: whoever submitted them can submit them again.
        """
        self._in_flight = None
        if self._disk is not None:
            self._save(time.monotonic() + SAVE_SECONDS)
            self._disk.close(CLOSE_SECONDS)
        self._runner.close()
        if self._keeper is not None:
            self._keeper.close()

    def _save(self, until: float) -> None:
        """Write the blocks that wait to be written to the disk, until the time `until` at most."""
        cache = self._scheduler.cache
        while cache.tiers.has_saves and time.monotonic() < until:
            self._scheduler.tend(POLL_SECONDS)
            if cache.has_copies:
                self._runner.submit(StepPlan(self._scheduler.step, copies=cache.take_copies())).result()
            if cache.num_moving:
                self._scheduler.arrived(self._runner.poll(POLL_SECONDS))

    def _plain_step(self, began: float) -> list[TokenEvent]:
        plan = self._scheduler.schedule(self._step_limits())
        if plan is None:
            return self._nothing_to_run()
        pending = self._runner.submit(plan)
        self._exposed_seconds += time.perf_counter() - began
        result = pending.result()
        known = time.perf_counter()
        events = self._commit(plan, result)
        self._exposed_seconds += time.perf_counter() - known
        return events

    def _overlapped_step(self, began: float) -> list[TokenEvent]:
        previous = self._in_flight
        plan = self._scheduler.schedule(self._step_limits())
        self._in_flight = None if plan is None else _InFlightStep(plan, self._runner.submit(plan), previous is not None)
        if previous is None:
            self._exposed_seconds += time.perf_counter() - began
            return [] if plan is not None else self._nothing_to_run()
        result = previous.pending.result()
        known = time.perf_counter()
        events = self._commit(previous.plan, result)
        if previous.followed:
            self._exposed_seconds += result.idle_seconds
        if self._in_flight is None:
            self._exposed_seconds += time.perf_counter() - known
        return events

    def _step_limits(self) -> StepLimits:
        """Return the limits of the next step. Nothing is computed for a step that can only decode: it has no use for limits."""
        if not self._scheduler.has_prompts:
            return self._controller.present
        return self._controller.limits(self._scheduler.load(), self._clock())

    def _commit(self, plan: StepPlan, result: StepResult) -> list[TokenEvent]:
        """Apply a step's result, and let the controller learn how long the step took."""
        self._device_seconds += result.device_seconds
        # A plan that only moves blocks tells nothing about steps, and one of a spilled context nothing about ordinary ones.
        if plan.rows and plan.spilled is None:
            self._latest_shape = StepShape.of(plan)
            self._controller.observe(self._latest_shape, result.device_seconds, self._clock())
        return self._scheduler.commit(plan, result)

    def _nothing_to_run(self) -> list[TokenEvent]:
        """Wait for a short while for blocks on their way between tiers, since no request can run without them."""
        cache = self._scheduler.cache
        if cache.num_moving:
            self._scheduler.arrived(self._runner.poll(POLL_SECONDS))
            return []
        if cache.num_loading or (self._disk is not None and not self._disk.is_idle):
            self._scheduler.tend(POLL_SECONDS)
            return []
        if self._scheduler.has_requests:
            raise InternalError("requests are running or waiting, no step is in flight, and none of them can be scheduled")
        return []


def build_core(config: EngineConfig, clock: StartupClock | None = None) -> Core:
    """Import and build the runner that `config` names, and return a Core of it and a new scheduler.

    `clock` measures the phases of the start. A caller may pass a clock that already counts earlier phases.
    """
    clock = clock or StartupClock()
    module = importlib.import_module(RUNNERS[config.runner])
    clock.end("imports")
    core = Core(module.build(config, clock))
    core.find_records(config.startup_budget_s, clock.progress)
    clock.end("ready")
    core.startup = clock.seconds
    return core
