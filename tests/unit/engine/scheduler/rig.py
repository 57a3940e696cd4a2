"""Rig: a scheduler without a runner, for tests that supply the results of the steps themselves."""

from __future__ import annotations

import itertools

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.plan import StepPlan, StepResult
from engine.request import Request, SamplingParams, TokenEvent
from engine.scheduler.limits import StepLimits
from engine.scheduler.policy import rank_of
from engine.scheduler.scheduler import Scheduler


class Rig:
    """Runs a scheduler whose clock always shows `now`. In each step, all rows sample the same token."""

    def __init__(
        self,
        *,
        blocks=100,
        block_size=4,
        rows=8,
        budget=64,
        max_queue=100,
        max_queue_tokens=1 << 30,
        max_skips=2,
        prefix_caching=True,
        max_model_len=1000,
        cost=None,
        host_slots=0,
        resident_tokens=1,
    ):
        self.now = 0.0
        self.limits = StepLimits(tokens=budget, seqs=rows, chunk=budget)
        self.max_model_len = max_model_len
        self.scheduler = Scheduler(
            EngineConfig(
                model="none",
                cache=CacheConfig(block_size=block_size, prefix_caching=prefix_caching, resident_tokens=resident_tokens),
                scheduler=SchedulerConfig(
                    max_num_seqs=rows,
                    max_step_tokens=budget,
                    max_queue=max_queue,
                    max_queue_tokens=max_queue_tokens,
                    max_skips=max_skips,
                ),
            ),
            blocks,
            cost=cost,
            clock=lambda: self.now,
            host_slots=host_slots,
        )

    def add(
        self,
        name: str,
        prompt: int | list[int],
        *,
        priority=0,
        fork_of=None,
        salt="",
        outputs=(),
        tenant="",
        slo="standard",
        deadline_s=None,
        promised=False,
        resumed=False,
        **params,
    ) -> Request:
        """Add a request to the scheduler. If `prompt` is a number, the prompt is that many tokens, which no other prompt has."""
        tokens = [sum(map(ord, name)) * 1000 + i for i in range(prompt)] if isinstance(prompt, int) else list(prompt)
        request = Request(
            name,
            tokens + list(outputs),
            SamplingParams(**{"max_tokens": 50} | params),
            num_prompt=len(tokens),
            seed=0,
            eos_token_ids=(2,),
            max_model_len=self.max_model_len,
            priority=priority,
            arrival=self.now,
            fork_of=fork_of,
            salt=salt,
            tenant=tenant,
            slo=slo,
            deadline_s=deadline_s,
            promised=promised,
        )
        self.scheduler.add(request, resumed=resumed)
        return request

    def schedule(self) -> StepPlan:
        plan = self.scheduler.schedule(self.limits)
        assert plan is not None
        return plan

    def commit(self, plan: StepPlan, token: int = 7, **result) -> dict[str, TokenEvent]:
        events = self.scheduler.commit(plan, StepResult(plan.step, [token] * len(plan.samples), **result))
        self.scheduler.check()
        return {event.request_id: event for event in events}

    def step(self, token: int = 7, **result) -> dict[str, TokenEvent]:
        return self.commit(self.schedule(), token, **result)


def slices(plan: StepPlan) -> list[tuple[int, int, int]]:
    return list(zip(plan.rows, plan.starts, plan.nums, strict=True))


_numbers = itertools.count(1)


def make_request(name: str, *, num_prompt: int = 1, max_tokens: int = 16, arrival: float = 0.0, **fields) -> Request:
    """Make a request that belongs to no scheduler, with a rank of its own."""
    request = Request(
        name,
        [1] * num_prompt,
        SamplingParams(max_tokens=max_tokens),
        num_prompt=num_prompt,
        seed=0,
        max_model_len=100_000,
        arrival=arrival,
        **fields,
    )
    request.sequence = next(_numbers)
    request.rank = rank_of(request)
    return request
