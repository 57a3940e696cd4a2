"""Runs random requests in random order. No block may leak, and every request must end once, with the tokens that it would get
alone.

FakeRunner verifies the content of every block that is read, and the scheduler checks its own state after every operation.
"""

import itertools
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import CacheConfig, EngineConfig, FakeConfig, ModelLimits, SchedulerConfig
from engine.core import Core
from engine.errors import ContextTooLong, Overloaded, RequestTimeout
from engine.fake import build_fake, expected_tokens
from engine.messages import Submit, pack_tokens, unpack_tokens
from engine.request import FinishReason, SamplingParams, Status, TokenEvent
from engine.scheduler.controller import FixedController
from engine.scheduler.limits import Load, StepLimits

LIMITS = ModelLimits(max_model_len=96, vocab_size=40, eos_token_ids=(3,), dtype="float32")
NAN_TOKEN = 13  # in some runs, a row that would sample this token id fails as if its logits were NaN
SHARED = [7, 8, 9, 7, 8, 9, 1, 1, 1, 2, 5, 6, 7, 8, 9, 4, 4]  # each prompt begins with some of these tokens


class RandomLimits(FixedController):
    """Sets random limits for each step."""

    def __init__(self, rng: random.Random, largest: StepLimits) -> None:
        super().__init__(largest)
        self.rng = rng

    def limits(self, load: Load, now: float) -> StepLimits:
        tokens = self.rng.randint(1, self.present.tokens)
        return StepLimits(tokens, self.rng.randint(1, self.present.seqs), self.rng.randint(1, tokens))


class Workload:
    """Applies random operations to a Core, and keeps the tokens and endings that the Core's clients have received."""

    def __init__(self, rng: random.Random, *, overlap: bool, prefix_caching: bool = True) -> None:
        self.rng = rng
        size = rng.choice((1, 2, 4, 8))
        max_num_seqs = rng.choice((1, 4, 8, 8))
        self.config = EngineConfig(
            model="none",
            runner="fake",
            overlap=overlap,
            debug_checks=True,
            # The smallest cache cannot hold one request of full length; the largest can hold four.
            cache=CacheConfig(block_size=size, num_blocks=rng.randint(60, 384) // size, prefix_caching=prefix_caching),
            scheduler=SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_step_tokens=max_num_seqs + rng.choice((0, 1, 5, 40)),
                max_queue=rng.choice((6, 100)),
                max_skips=rng.choice((0, 1, 5)),
            ),
            fake=FakeConfig(nan_token=rng.choice((None, None, NAN_TOKEN))),
        )
        self.core = self.make_core()
        if rng.random() < 0.5:
            self.core._controller = RandomLimits(rng, self.core._controller.present)
        self.scheduler = self.core._scheduler
        self.submits: dict[str, Submit] = {}
        self.tokens: dict[str, list[int]] = {}
        self.endings: dict[str, TokenEvent] = {}
        self.numbers = itertools.count()
        self.refused = 0
        self.stalls = 0  # consecutive steps in which the running request of the best rank did not advance

    def make_core(self) -> Core:
        return Core(build_fake(self.config, LIMITS))

    def prompt(self) -> list[int]:
        rng = self.rng
        return SHARED[: rng.randint(1, len(SHARED))] + [rng.randrange(40) for _ in range(rng.choice((0, 0, 1, 5, 20)))]

    def submit(self) -> None:
        """Submit one to four siblings with one prompt. Some of them continue a stream that an earlier engine began."""
        rng, prompt = self.rng, self.prompt()
        num, leader = rng.choice((1, 1, 2, 4)), None
        priority, salt = rng.choice((0, 0, 0, -1, 2)), rng.choice(("", "", "x"))
        tenant, slo = rng.choice(("", "", "a", "b")), rng.choice(("standard", "standard", "interactive", "batch"))
        for _ in range(num):
            name = f"r{next(self.numbers)}"
            submit = Submit(
                request_id=name,
                prompt=pack_tokens(prompt),
                params=self.params(len(prompt)),
                seed=rng.randrange(5),
                priority=priority if rng.random() < 0.8 else 1,
                salt=salt,
                fork_of=leader,
                tenant=tenant,
                slo=slo,
                deadline_s=rng.choice((None, None, 0.001, 5.0)),
            )
            if rng.random() < 0.1:
                submit = resumed(submit, rng.randrange(submit.params.max_tokens))
            leader = leader or name
            self.offer(submit)

    def params(self, num_prompt: int) -> SamplingParams:
        rng = self.rng
        max_tokens = rng.randint(1, rng.choice((2, 40, LIMITS.max_model_len - num_prompt)))
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=rng.randint(0, max_tokens),
            ignore_eos=rng.random() < 0.8,
            stop_token_ids=(11, 12) if rng.random() < 0.1 else (),
            logprobs=rng.choice((None, None, 0, 2)),
            prompt_logprobs=rng.choice((None, None, None, 1)),
        )

    def offer(self, submit: Submit) -> None:
        try:
            self.core.submit(submit)
        except (ContextTooLong, Overloaded, RequestTimeout):
            self.refused += 1
            return
        self.submits[submit.request_id] = submit
        self.tokens[submit.request_id] = list(unpack_tokens(submit.outputs))

    def abort(self) -> None:
        live = [name for name in self.submits if name not in self.endings]
        if live:
            self.core.abort(self.rng.choice(live))

    def step(self) -> None:
        """Run a step. The running request of the best rank must advance, except that it may wait at most two steps for a request
        that is ending, and that it gives up its place for a request of a higher class."""
        running = list(self.scheduler._running)
        best = min((r for r in running if r.num_tokens < r.end_len), key=lambda r: r.rank, default=None)
        at = best.num_computed if best else 0
        waits = self.waits_for_moves()
        displaced = best is not None and any(r.slo.rank < best.rank[0] for r in self.scheduler._queue)
        events = self.core.step()
        if best is not None and best.status is not Status.FINISHED and not displaced:
            assert best.status is Status.RUNNING, f"{best} was preempted, although it has the best rank"
            self.stalls = self.stalls + 1 if best.num_computed == at and not waits else 0
            assert self.stalls <= 2, f"{best} does not advance"
        for event in events:
            self.receive(event)

    def waits_for_moves(self) -> bool:
        """Return whether a running request may lack blocks until moves between tiers have ended."""
        return False

    def receive(self, event: TokenEvent) -> None:
        name = event.request_id
        assert name not in self.endings, "an event after the last one"
        params, first = self.submits[name].params, not self.tokens[name] and bool(event.tokens)
        self.tokens[name] += event.tokens
        assert (event.cached is not None) == first
        assert (event.queue_s is not None) == first
        if event.tokens:
            assert (event.logprobs is not None) == (params.logprobs is not None)
        assert (event.prompt_logprobs is not None) == (first and params.prompt_logprobs is not None)
        if event.prompt_logprobs is not None:
            assert event.prompt_logprobs[0] is None
            assert [p.token for p in event.prompt_logprobs[1:]] == list(unpack_tokens(self.submits[name].prompt))[1:]
        if event.finish is not None:
            self.endings[name] = event

    def check(self) -> None:
        self.scheduler.check()
        s = self.core.stats()
        assert s.num_accepted == s.num_finished + s.num_aborted + s.num_failed + s.running + s.waiting
        assert s.num_accepted == len(self.submits)
        assert s.cached_tokens <= s.prompt_tokens

    def drain(self) -> None:
        for _ in range(20000):
            if not self.core.has_work:
                return
            self.step()
        raise AssertionError("the requests do not end")

    def check_end(self) -> None:
        stats = self.core.stats()
        assert set(self.endings) == set(self.submits)
        assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
        assert not self.scheduler.cache._chains
        assert stats.output_tokens == sum(len(t) - self.submits[n].num_outputs for n, t in self.tokens.items())
        nan_token = self.config.fake.nan_token
        for name, ending in self.endings.items():
            assert_as_alone(self.submits[name], self.tokens[name], ending, nan_token)


def resumed(submit: Submit, num: int) -> Submit:
    """Return `submit` with up to `num` outputs, as if an earlier engine had generated them."""
    outputs = expected_tokens(unpack_tokens(submit.prompt), num, submit.params, submit.seed, LIMITS)
    stops = {*stop_ids(submit.params), NAN_TOKEN}
    cut = next((i for i, token in enumerate(outputs) if token in stops), len(outputs))
    return Submit(**{f: getattr(submit, f) for f in submit.__struct_fields__} | {"outputs": pack_tokens(outputs[:cut])})


def stop_ids(params: SamplingParams) -> set[int]:
    return {*params.stop_token_ids, *(() if params.ignore_eos else LIMITS.eos_token_ids)}


def assert_as_alone(submit: Submit, tokens: list[int], ending: TokenEvent, nan_token: int | None) -> None:
    """Check the tokens of a request that has ended against those of the same request in an engine of its own."""
    params = submit.params
    alone = expected_tokens(unpack_tokens(submit.prompt), params.max_tokens, params, submit.seed, LIMITS)
    stops = [i for i, t in enumerate(alone) if t in stop_ids(params) and i + 1 >= params.min_tokens]
    assert nan_token not in tokens[submit.num_outputs :]
    if ending.finish is FinishReason.ABORT:
        assert tokens == alone[: len(tokens)]
    elif ending.finish is FinishReason.ERROR:
        assert ending.failure.error == "NumericalError"
        assert [*tokens, nan_token] == alone[: len(tokens) + 1]
    elif stops:
        assert tokens == alone[: stops[0] + 1]
        assert (ending.finish, ending.stop_token) == (FinishReason.STOP, tokens[-1])
    else:
        assert tokens == alone
        assert (ending.finish, ending.stop_token) == (FinishReason.LENGTH, None)


class CountCopies:
    """Wraps a runner and counts the KV blocks that forks copied."""

    def __init__(self, runner):
        self.runner = runner
        self.num_blocks = runner.num_blocks
        self.num_compiled = runner.num_compiled
        self.copies = 0

    def submit(self, plan):
        self.copies += len(plan.copies)
        return self.runner.submit(plan)


def run(workload: Workload, operations: int) -> None:
    for _ in range(operations):
        action = workload.rng.random()
        if action < 0.2:
            workload.submit()
        elif action < 0.24:
            workload.abort()
        else:
            workload.step()
        workload.check()
    workload.drain()
    workload.check()
    workload.check_end()


@pytest.mark.parametrize("overlap", [False, True])
def test_ten_thousand_random_operations(overlap):
    ends: Counter[str] = Counter()
    copies = 0
    for seed in range(25):
        workload = Workload(random.Random(seed), overlap=overlap, prefix_caching=seed % 5 != 0)
        workload.core._runner = CountCopies(workload.core._runner)
        run(workload, 400)
        stats = workload.core.stats()
        ends.update(finished=stats.num_finished, aborted=stats.num_aborted, preempted=stats.num_preemptions)
        ends.update(refused=workload.refused, cached=stats.cached_tokens, failed=stats.num_failed)
        copies += workload.core._runner.copies
    # The random runs must cover each kind of event often.
    assert min(*(ends[name] for name in ("preempted", "refused", "aborted", "cached", "failed")), copies) > 50, (ends, copies)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False), overlap=st.booleans(), operations=st.integers(1, 60))
def test_short_random_runs_that_can_be_shrunk(rng, overlap, operations):
    run(Workload(rng, overlap=overlap), operations)


@pytest.mark.parametrize("seed", range(10))
def test_overlap_gives_the_same_tokens_as_the_plain_loop(seed):
    seen = []
    for overlap in (False, True):
        workload = Workload(random.Random(seed), overlap=overlap)
        for _ in range(15):
            workload.submit()
        workload.drain()
        seen.append({name: (workload.tokens[name], workload.endings[name].finish) for name in workload.submits})
    common = seen[0].keys() & seen[1].keys()
    assert len(common) >= 5
    assert all(seen[0][name] == seen[1][name] for name in common)
