"""Tests of the scheduler's rules: budget, order, stopping, overlap, preemption, siblings and aborts."""

import pytest

from engine.errors import ContextTooLong, InternalError, InvalidRequest, Overloaded
from engine.plan import BlockCopy, StepResult, gpu
from engine.request import CachedTokens, FinishReason, Status, TokenEvent, TokenLogprobs
from tests.unit.engine.scheduler.rig import Rig, slices


def test_a_prompt_runs_in_chunks_and_only_the_last_chunk_samples():
    rig = Rig(budget=10)
    request = rig.add("a", 25)
    seen = []
    for _ in range(4):
        plan = rig.schedule()
        seen.append((slices(plan)[0][1:], plan.samples, plan.num_decodes))
        rig.commit(plan)
    assert seen == [((0, 10), [], 0), ((10, 10), [], 0), ((20, 5), [0], 0), ((25, 1), [0], 1)]
    assert request.num_outputs == 2


def test_decodes_are_planned_first_and_chunks_share_the_rest_of_the_budget():
    rig = Rig(budget=12)
    a = rig.add("a", 4)
    rig.step()
    b, c = rig.add("b", 9), rig.add("c", 9)
    plan = rig.schedule()
    assert slices(plan) == [(a.row, 4, 1), (b.row, 0, 9), (c.row, 0, 2)]
    assert (plan.num_decodes, plan.samples) == (1, [0, 1])
    assert [admitted.row for admitted in plan.admitted] == [b.row, c.row]


def test_decodes_are_planned_longest_context_first():
    """Although the scheduler sorts the decodes of a step, each sampled token goes to the request that it was sampled for."""
    rig = Rig(budget=100)
    short, longest, middle = rig.add("s", 3), rig.add("l", 20), rig.add("m", 9)
    rig.step()
    plan = rig.schedule()
    assert slices(plan) == [(longest.row, 20, 1), (middle.row, 9, 1), (short.row, 3, 1)]
    rig.scheduler.commit(plan, StepResult(plan.step, [11, 12, 13]))
    assert [r.tokens[-1] for r in (longest, middle, short)] == [11, 12, 13]


def test_an_admitted_row_has_copies_of_the_requests_tokens_and_blocks():
    rig = Rig()
    request = rig.add("a", 6)
    (admitted,) = rig.schedule().admitted
    assert admitted.tokens == request.tokens
    assert admitted.tokens is not request.tokens
    assert admitted.blocks == request.blocks
    assert admitted.blocks is not request.blocks


def test_a_block_table_grows_when_its_blocks_are_full():
    rig = Rig()
    rig.add("a", 7)
    grown = []
    for _ in range(7):
        plan = rig.schedule()
        grown.append([(g.length, len(g.blocks)) for g in plan.grown])
        rig.commit(plan)
    assert grown == [[], [], [(2, 1)], [], [], [], [(3, 1)]]


def test_a_request_ends_at_max_tokens():
    rig = Rig()
    rig.add("a", 3, max_tokens=2)
    assert rig.step()["a"].finish is None
    assert rig.step()["a"].finish is FinishReason.LENGTH
    assert rig.scheduler.schedule(rig.limits) is None
    assert rig.scheduler.cache.num_used == 0


@pytest.mark.parametrize(("token", "params"), [(2, {}), (9, {"stop_token_ids": (9,)})])
def test_a_stop_token_ends_a_request_and_is_reported(token, params):
    rig = Rig()
    rig.add("a", 3, **params)
    event = rig.step(token)["a"]
    assert (event.tokens, event.finish, event.stop_token) == ([token], FinishReason.STOP, token)


def test_stop_tokens_count_only_from_min_tokens_on_and_eos_can_be_ignored():
    rig = Rig()
    rig.add("a", 3, min_tokens=2)
    rig.add("b", 3, ignore_eos=True)
    assert rig.step(2)["a"].finish is None
    events = rig.step(2)
    assert events["a"].finish is FinishReason.STOP
    assert events["b"].finish is None


def test_values_of_the_first_event_are_not_reported_again():
    rig = Rig(budget=8)
    rig.add("a", 10)
    rig.now = 3.0
    rig.step()
    rig.now = 4.0
    first, second = rig.step()["a"], rig.step()["a"]
    assert (first.cached, first.queue_s) == (CachedTokens(), 3.0)
    assert (second.cached, second.queue_s) == (None, None)


def test_num_cached_counts_the_prompt_tokens_found_in_the_cache():
    rig = Rig()
    prompt = list(range(10, 22))
    rig.add("a", prompt)
    rig.step()
    rig.add("b", prompt)
    plan = rig.schedule()
    assert slices(plan)[1][1:] == (8, 4)
    assert rig.commit(plan)["b"].cached == CachedTokens(gpu=8)
    assert (rig.scheduler.counts.prompt_tokens, rig.scheduler.counts.cached_tokens) == (24, 8)


def test_logprobs_are_reported_with_their_tokens_and_prompt_logprobs_with_the_first():
    rig = Rig(budget=8)
    rig.add("a", list(range(10, 21)), logprobs=0, prompt_logprobs=0)

    def entries(tokens):
        return [TokenLogprobs(t, -1.0, 1, [], []) for t in tokens]

    assert rig.step(prompt_logprobs={0: entries(range(11, 19))}) == {}
    event = rig.step(prompt_logprobs={0: entries((19, 20))}, logprobs={0: entries([7])[0]})["a"]
    assert [p and p.token for p in event.prompt_logprobs] == [None, *range(11, 21)]
    assert [p.token for p in event.logprobs] == [7]
    assert rig.step(logprobs={0: entries([7])[0]})["a"].prompt_logprobs is None


def test_a_prompt_whose_logprobs_are_requested_is_computed_completely():
    rig = Rig()
    rig.add("a", list(range(12)))
    rig.step()
    rig.add("b", list(range(12)), prompt_logprobs=0)
    rig.add("c", list(range(12)), prompt_logprobs=0, fork_of="b")
    assert [s[1:] for s in slices(rig.schedule())[1:]] == [(0, 12), (0, 12)]


# The following tests run with overlap: each step is scheduled before the previous step is committed.


def test_the_next_step_continues_after_an_uncommitted_token():
    rig = Rig()
    request = rig.add("a", 5)
    first, second = rig.schedule(), rig.schedule()
    assert slices(second) == [(request.row, 5, 1)]
    assert rig.commit(first)["a"].tokens == [7]
    assert rig.commit(second)["a"].tokens == [7]
    assert request.num_uncommitted == 0


def test_a_request_whose_uncommitted_token_is_its_last_is_not_scheduled_again():
    rig = Rig()
    rig.add("a", 5, max_tokens=1)
    plan = rig.schedule()
    assert rig.scheduler.schedule(rig.limits) is None
    assert rig.commit(plan)["a"].finish is FinishReason.LENGTH


def test_a_token_sampled_for_a_request_that_has_ended_is_dropped():
    rig = Rig()
    rig.add("a", 5)
    rig.add("b", 5)
    first, second = rig.schedule(), rig.schedule()
    assert rig.commit(first, token=2)["a"].finish is FinishReason.STOP
    assert rig.commit(second) == {}
    assert rig.scheduler.counts.output_tokens == 2


def test_committing_plans_out_of_order_is_an_error():
    rig = Rig()
    rig.add("a", 5)
    rig.schedule()
    second = rig.schedule()
    with pytest.raises(InternalError):
        rig.commit(second)


# In the following tests there are too few blocks for all requests.


def test_the_worst_rank_is_preempted_and_starts_again_with_its_outputs():
    rig = Rig(blocks=4, prefix_caching=False)
    old, new = rig.add("old", 7, max_tokens=8), rig.add("new", 7, max_tokens=8)
    rig.step()
    rig.step()
    plan = rig.schedule()  # both requests are at position 8, and both need a third block
    assert slices(plan) == [(old.row, 8, 1)]
    assert (new.status, new.blocks, new.num_computed, new.row) == (Status.WAITING, [], 0, None)
    assert rig.scheduler.counts.num_preemptions == 1
    rig.commit(plan)
    while old.status is Status.RUNNING:
        rig.step()
    plan = rig.schedule()
    assert [a.tokens for a in plan.admitted] == [new.tokens]
    assert len(new.tokens) == 9
    assert slices(plan) == [(new.row, 0, 9)]
    assert rig.scheduler.counts.prompt_tokens == 14  # a prompt is counted once, also if it is computed twice


def test_priority_decides_before_arrival_who_is_preempted():
    rig = Rig(blocks=4, prefix_caching=False)
    early, urgent = rig.add("early", 7, max_tokens=8), rig.add("urgent", 7, max_tokens=8, priority=-1)
    rig.step()
    rig.step()
    rig.schedule()
    assert (early.status, urgent.status) == (Status.WAITING, Status.RUNNING)


def test_a_step_short_of_blocks_admits_nobody():
    rig = Rig(blocks=5, prefix_caching=False)
    rig.add("a", 7, max_tokens=8)
    rig.add("b", 7, max_tokens=8)
    rig.step()
    rig.step()
    tiny = rig.add("tiny", 1, max_tokens=1)
    rig.add("b2", 1, max_tokens=1)
    plan = rig.schedule()  # a takes the last free block; b is preempted, which frees two blocks
    assert plan.admitted == []
    assert tiny.status is Status.WAITING
    rig.commit(plan)
    assert [a.row for a in rig.schedule().admitted]


def test_a_preempted_request_gets_its_uncommitted_token_before_it_is_admitted_again():
    rig = Rig()
    rig.add("a", 7)
    b = rig.add("b", 7)
    uncommitted = rig.schedule()
    rig.scheduler._preempt(b)
    again = rig.schedule()  # the preempted request would fit, but its next token is not committed yet
    assert again.admitted == []
    assert rig.commit(uncommitted)["b"].tokens == [7]
    assert len(b.tokens) == 8
    assert [admitted.tokens for admitted in rig.schedule().admitted] == [b.tokens]


def test_a_preempted_request_can_end_with_its_uncommitted_token():
    rig = Rig()
    request = rig.add("a", 7)
    plan = rig.schedule()
    rig.scheduler._preempt(request)
    assert rig.commit(plan, token=2)["a"].finish is FinishReason.STOP
    assert not rig.scheduler.has_requests


def test_no_request_is_preempted_while_another_is_about_to_free_its_blocks():
    rig = Rig(blocks=4, prefix_caching=False)
    ending, other = rig.add("ending", 7, max_tokens=2), rig.add("other", 7, max_tokens=8)
    rig.step()
    last = rig.schedule()  # samples the last token of `ending`
    assert rig.scheduler.schedule(rig.limits) is None  # `other` needs a block and waits for a step
    assert other.status is Status.RUNNING
    rig.commit(last)
    assert ending.status is Status.FINISHED
    assert slices(rig.schedule()) == [(other.row, 8, 1)]
    assert rig.scheduler.counts.num_preemptions == 0


def test_a_request_that_cannot_fit_into_an_empty_cache_is_refused():
    rig = Rig(blocks=4)
    rig.add("fits", 10, max_tokens=7)  # the last of the 17 tokens needs no slot in the cache
    with pytest.raises(ContextTooLong):
        rig.add("does not", 10, max_tokens=8)
    assert rig.scheduler.counts.num_accepted == 1


def test_a_full_queue_and_an_id_in_use_are_refused():
    rig = Rig(max_queue=2)
    rig.add("a", 1)
    with pytest.raises(InvalidRequest):
        rig.add("a", 1)
    rig.add("b", 1)
    with pytest.raises(Overloaded):
        rig.add("c", 1)


@pytest.mark.parametrize("max_skips", [0, 1, 3])
def test_a_request_that_does_not_fit_is_overtaken_at_most_max_skips_times(max_skips):
    rig = Rig(blocks=10, max_skips=max_skips, prefix_caching=False)
    rig.add("long", 20, max_tokens=12)
    rig.step()
    big = rig.add("big", 30, max_tokens=2)
    small = [rig.add(f"small{i}", 1, max_tokens=1) for i in range(5)]
    for _ in range(5):
        rig.step()
    assert sum(request.status is Status.FINISHED for request in small) == max_skips
    assert big.skips == max_skips
    while big.status is not Status.FINISHED:
        rig.step()
    assert big.skips == 0


@pytest.mark.parametrize(("blocks", "status"), [(196, Status.RUNNING), (197, Status.WAITING)])
def test_one_block_in_a_hundred_stays_free_for_running_requests(blocks, status):
    rig = Rig(blocks=200, budget=1000, prefix_caching=False)
    rig.add("a", 4)
    rig.step()
    tight = rig.add("tight", blocks * 4, max_tokens=4)
    rig.step()  # request "a" takes a second block
    assert tight.status is status


# The following tests are about siblings: the requests of one call with n > 1.


def test_a_sibling_waits_for_its_leaders_prompt_and_then_shares_it():
    rig = Rig(budget=8)
    prompt = list(range(10, 20))
    leader, sibling = rig.add("a", prompt), rig.add("b", prompt, fork_of="a")
    first, second = rig.schedule(), rig.schedule()
    assert sibling.status is Status.WAITING
    third = rig.schedule()
    assert slices(third) == [(leader.row, 10, 1), (sibling.row, 9, 1)]
    assert third.copies == [BlockCopy(gpu(leader.blocks[2]), gpu(sibling.blocks[2]))]
    assert sibling.blocks[:2] == leader.blocks[:2]
    assert third.samples == [0, 1]
    for plan in (first, second, third):
        rig.commit(plan)


@pytest.mark.parametrize("change", ["salt", "tokens", "ended", "outputs"])
def test_a_request_that_cannot_fork_its_leader_is_computed_completely(change):
    rig = Rig(prefix_caching=False)
    leader = rig.add("a", list(range(10, 20)))
    rig.step()
    tokens = list(range(30, 40)) if change == "tokens" else list(range(10, 20))
    other = rig.add("b", tokens, fork_of="a", salt="x" if change == "salt" else "", outputs=[5] if change == "outputs" else [])
    if change == "ended":
        rig.scheduler.abort("a")
    plan = rig.schedule()
    assert plan.copies == []
    assert slices(plan)[-1][1:] == (0, len(other.tokens))
    assert not set(leader.blocks) & set(other.blocks)


def test_a_resumed_sibling_does_not_wait_for_its_leader():
    rig = Rig(budget=20, prefix_caching=False)
    prompt = list(range(10, 20))
    rig.add("a", prompt, prompt_logprobs=0)
    rig.add("b", prompt, fork_of="a", outputs=[5])
    assert len(rig.schedule().admitted) == 2


def test_a_sibling_outlives_its_leader():
    rig = Rig()
    prompt = list(range(10, 20))
    rig.add("a", prompt)
    rig.step()
    sibling = rig.add("b", prompt, fork_of="a")
    rig.step()
    assert rig.scheduler.abort("a").finish is FinishReason.ABORT
    rig.scheduler.check()
    assert rig.step()["b"].tokens == [7]
    rig.scheduler.abort(sibling.request_id)
    assert rig.scheduler.cache.num_used == 0


# The following tests abort requests.


def test_an_abort_ends_a_running_or_waiting_request_once():
    rig = Rig(rows=1)
    rig.add("running", 5)
    plan = rig.schedule()
    rig.add("waiting", 5)
    for name in ("running", "waiting"):
        assert rig.scheduler.abort(name) == TokenEvent(name, [], FinishReason.ABORT)
        assert rig.scheduler.abort(name) is None
    assert rig.commit(plan) == {}
    assert (rig.scheduler.counts.num_aborted, rig.scheduler.has_requests) == (2, False)


def test_an_id_can_be_used_again_while_a_step_of_the_earlier_request_is_in_flight():
    rig = Rig()
    rig.add("a", 5)
    plan = rig.schedule()
    rig.scheduler.abort("a")
    rig.add("a", 3)
    second = rig.schedule()
    assert rig.commit(plan) == {}
    assert rig.commit(second)["a"].tokens == [7]


def test_rows_are_reused():
    rig = Rig(rows=2)
    rows = set()
    for i in range(5):
        request = rig.add(f"r{i}", 3, max_tokens=2)
        rig.step()
        rows.add(request.row)
        rig.step()
    assert rows <= {0, 1}
