"""Tests of prompts that begin with the same tokens: one request computes the shared blocks, and the others wait for them."""

import random

import pytest

from engine.kvcache.chain import Chain
from engine.kvcache.prefix import PrefixIndex
from engine.request import Request, Status
from engine.scheduler.admission import MAX_BLOCKED, MAX_DEFERRED, MAX_STALLED
from tests.unit.engine.scheduler.rig import Rig, slices

BLOCK = 4
PREFIX = list(range(100, 141))  # ten full blocks and one token


def chunk_tokens(plan) -> int:
    """Return how many tokens of prompt chunks a plan computes."""
    return sum(plan.nums[plan.num_decodes :])


def run(rig: Rig, arrivals: dict[int, list[tuple[str, dict]]], *, overlap: bool) -> tuple[int, list[Request]]:
    """Add requests in the steps that `arrivals` names, and run until all have ended. Returns the prompt tokens computed."""
    computed, requests, uncommitted = 0, [], []
    for step in range(1000):
        requests += [rig.add(name, **options) for name, options in arrivals.get(step, ())]
        plan = rig.scheduler.schedule(rig.limits)
        if plan is not None:
            computed += chunk_tokens(plan)
            uncommitted.append(plan)
        if uncommitted and (plan is None or not overlap or len(uncommitted) > 1):
            rig.commit(uncommitted.pop(0))
        if step > max(arrivals) and not rig.scheduler.has_requests:
            return computed, requests
    raise AssertionError("the requests do not end")


def shared_tokens(tokens: list[int], others: list[list[int]]) -> int:
    """Return how many tokens `tokens` has in common with the beginning of another prompt, in whole blocks."""
    longest = 0
    for other in others:
        common = next((i for i, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b), min(len(tokens), len(other)))
        longest = max(longest, min(common, len(tokens) - 1))
    return longest // BLOCK * BLOCK


PATTERNS = {
    "together": lambda r, n: [0] * n,
    "one each step": lambda r, n: list(range(n)),
    "two waves": lambda r, n: [0] * (n // 2) + [3] * (n - n // 2),
    "scattered": lambda r, n: sorted(r.randrange(12) for _ in range(n)),
}
KINDS = {
    "equal prompts": lambda r, i: PREFIX,
    "own endings": lambda r, i: [*PREFIX, 1000 + i, *range(r.randrange(20))],
    "a tree": lambda r, i: PREFIX[: 12 + 8 * (i % 4)] + [1000 + i % 3] * 9 + [2000 + i] * r.randrange(1, 9),
    "nothing in common": lambda r, i: [1000 + i] * r.randrange(1, 30),
}


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@pytest.mark.parametrize("budget", [8, 13, 64, 1000])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_shared_block_is_computed_once(kind, pattern, budget, overlap):
    r = random.Random(f"{kind} {pattern} {budget}")
    prompts = [KINDS[kind](r, i) for i in range(8)]
    arrivals: dict[int, list] = {}
    for i, step in enumerate(PATTERNS[pattern](r, 8)):
        arrivals.setdefault(step, []).append((f"r{i}", {"prompt": prompts[i], "max_tokens": r.choice((1, 3, 30))}))
    computed, requests = run(Rig(budget=budget, blocks=1000), arrivals, overlap=overlap)
    least = sum(len(prompt) - shared_tokens(prompt, prompts[:i]) for i, prompt in enumerate(prompts))
    assert computed == least
    assert all(request.status is Status.FINISHED for request in requests)


@pytest.mark.parametrize("budget", [8, 64])
def test_siblings_of_equal_prompts_share_one_computation(budget):
    """Two calls with n = 3 arrive together: one prompt is computed, and each sibling computes only the last token."""
    rig = Rig(budget=budget)
    calls = [(f"{call}{i}", {"prompt": PREFIX, "fork_of": None if i == 0 else f"{call}0"}) for call in "ab" for i in range(3)]
    computed, requests = run(rig, {0: [(name, options | {"max_tokens": 5}) for name, options in calls]}, overlap=True)
    assert computed == len(PREFIX) + 5
    assert [request.num_outputs for request in requests] == [5] * 6


def test_blocks_of_a_submitted_step_are_shared_by_the_next_step_but_not_by_the_same():
    rig = Rig()
    first, second = rig.add("a", PREFIX), rig.add("b", PREFIX)
    assert slices(rig.schedule()) == [(first.row, 0, 41)]
    plan = rig.schedule()  # the first step is not committed
    assert slices(plan) == [(first.row, 41, 1), (second.row, 40, 1)]
    assert second.blocks[:10] == first.blocks[:10]


def test_requests_that_compute_everything_do_not_wait_but_others_wait_for_them():
    rig = Rig(budget=1000)
    for name in "ab":
        rig.add(name, PREFIX, prompt_logprobs=0)
    waiting = rig.add("c", PREFIX)
    assert [num for _, _, num in slices(rig.schedule())] == [41, 41]
    assert waiting.status is Status.WAITING
    assert slices(rig.schedule())[-1] == (waiting.row, 40, 1)


def abort(rig: Rig, request: Request) -> None:
    rig.scheduler.abort(request.request_id)


def preempt(rig: Rig, request: Request) -> None:
    rig.scheduler._preempt(request)


@pytest.mark.parametrize("end", [abort, preempt])
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_a_request_stops_waiting_when_the_one_that_computes_its_prefix_stops(end, num_steps):
    rig = Rig(budget=8)
    first, second = rig.add("a", PREFIX), rig.add("b", PREFIX)
    for _ in range(num_steps):
        rig.step()
    end(rig, first)
    plan = rig.schedule()
    running = first if end is preempt else second
    assert slices(plan) == [(running.row, 8 * num_steps, min(8, 41 - 8 * num_steps))]
    rig.commit(plan)
    while rig.scheduler.has_requests:
        rig.step()


@pytest.mark.parametrize("num_aborted", [1, 5, 20])
def test_requests_that_keep_being_aborted_do_not_hold_up_the_last_one(num_aborted):
    """Each request that computes the prefix is aborted after one step. The last request needs no more steps than tokens."""
    rig = Rig(budget=1, rows=1)
    doomed = [rig.add(f"d{i}", PREFIX) for i in range(num_aborted)]
    last = rig.add("last", PREFIX, max_tokens=1)
    for request in doomed:
        rig.step()
        rig.scheduler.abort(request.request_id)
    steps = 0
    while last.status is not Status.FINISHED:
        rig.step()
        steps += 1
    assert steps <= len(PREFIX)


def test_the_wait_for_a_request_that_does_not_advance_is_bounded():
    """An urgent prompt takes the whole budget, so the request that computes the shared prefix does not advance."""
    rig = Rig(budget=8, blocks=1000)
    slow = rig.add("slow", PREFIX, priority=1)
    rig.step()
    rig.add("urgent", 400)
    rig.scheduler._running.add(rig.scheduler._requests["urgent"])  # admits the request by hand
    rig.scheduler._queue.remove(rig.scheduler._requests["urgent"])
    assert rig.scheduler.cache.admit(rig.scheduler._requests["urgent"])
    waiting = rig.add("waiting", PREFIX, priority=-1)
    admission = rig.scheduler._prompts._admission
    admitted_at = next(look for look in range(100) if any(r is waiting for r in admission.admissible([], 0.0, 8)))
    assert slow.num_computed == 8
    assert admitted_at == 1 + MAX_STALLED  # the first look sees `slow` advance; the others do not
    assert waiting.num_computed == 8  # `waiting` shares the blocks that `slow` has computed


@pytest.fixture
def lookups(monkeypatch):
    """Count the look-ups of blocks in the prefix index. The fixture is a list whose only element is the count."""
    count = [0]
    find = PrefixIndex.find

    def counted(self, digest):
        count[0] += 1
        return find(self, digest)

    monkeypatch.setattr(PrefixIndex, "find", counted)
    return count


def test_a_step_looks_at_a_bounded_number_of_waiting_requests(lookups):
    """800 requests wait for the prefix that the first request computes, and the step has budget left for them."""
    rig = Rig(budget=64, rows=300, max_queue=1000)
    for i in range(800):
        rig.add(f"r{i}", [*PREFIX, 1000 + i])
    plan = rig.schedule()
    assert plan.nums == [42]
    assert MAX_DEFERRED <= lookups[0] <= MAX_DEFERRED + 20


@pytest.mark.parametrize("cached", ["nothing", "held", "free"])
def test_blocked_requests_are_not_matched_again_in_every_step(lookups, cached):
    """Long prompts that do not fit cost a fixed number of look-ups in each step, while another request decodes."""
    prompt = list(range(10, 10 + 400 * BLOCK))
    rig = Rig(blocks=800, rows=32, budget=10_000, max_skips=1000, max_model_len=10_000)
    if cached != "nothing":
        rig.add("cached", prompt, max_tokens=1 if cached == "free" else 1000)
        rig.step()
    rig.add("holder", (350 if cached == "held" else 700) * BLOCK, max_tokens=300)
    rig.step()
    blocked = [rig.add(f"b{i}", [*prompt, *range(BLOCK * (100 + i))], max_tokens=1) for i in range(MAX_BLOCKED)]
    rig.step()
    lookups[0] = 0
    for _ in range(50):
        rig.step()
    assert all(request.status is Status.WAITING for request in blocked)
    assert lookups[0] <= 50 * 3 * MAX_BLOCKED


@pytest.mark.parametrize("seed", range(20))
def test_a_remembered_match_is_what_a_new_match_finds(seed):
    """After each of many random steps, a match remembered from earlier steps has the same blocks as a new match.

    A request that is remembered as too large does not fit by the new match either.
    """
    r = random.Random(seed)
    rig = Rig(blocks=60, rows=6, budget=40, max_skips=r.choice((0, 2, 50)))
    cache, num_blocked = rig.scheduler.cache, 0
    for i in range(150):
        if r.random() < 0.5:
            prompt = [r.choice((1, 2))] * BLOCK * r.randrange(2) + PREFIX[: r.randrange(1, 41)] + [1000 + i] * r.randrange(60)
            rig.add(f"r{i}", prompt, max_tokens=r.choice((1, 20, 60)), ignore_eos=True)
        if r.random() < 0.1 and rig.scheduler._requests:
            rig.scheduler.abort(r.choice(list(rig.scheduler._requests)))
        plan = rig.scheduler.schedule(rig.limits)
        if plan is not None:
            rig.commit(plan)
        for request in rig.scheduler._queue:
            cache.match(request)
            remembered, fresh = cache._chains[request], Chain(cache._identity, request.salt, request.tokens)
            cache._index.match(fresh, (len(request.tokens) - 1) // BLOCK)
            assert all(a is b for a, b in zip(remembered.matched, fresh.matched, strict=True))
            if cache._pool.num_released < remembered.retry_at:
                num_blocked += 1
                assert cache._missing(request, [entry.block for entry in fresh.matched]) > 0
    assert num_blocked > 10
