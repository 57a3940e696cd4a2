"""Tests that a seed determines a load, and that its arrivals, lengths and sessions have the right statistics."""

import numpy as np
import pytest

from loadtest.arrivals import arrivals
from loadtest.plan import WARM_UP, Plan, longest
from loadtest.prompts import Prompts
from loadtest.record import Reading
from loadtest.spec import SHAPES, Lengths, Sessions, Step, Target
from tests.unit.loadtest.samples import load

TARGET = Target("http://host", "generate", vocab=500)
AGENTS = Sessions(num=2, turns=10, context=1000, think_s=1.0, fork=0.5, fork_turns=3)


def test_the_same_seed_makes_the_same_load_and_another_seed_another():
    def everything(**fields):
        plan = Plan(load(prefix=4, cancel=0.5, slow=0.5, prefixes=3, **fields))
        orders = plan.open_loop()
        return orders, [Prompts(plan, TARGET).of(order).ids.tolist() for order in orders[:20]]

    assert everything(seed=1) == everything(seed=1)
    assert everything(seed=1)[0] != everything(seed=2)[0]
    first, second = everything(number=0), everything(number=1)
    assert not {tuple(ids) for ids in first[1]} & {tuple(ids) for ids in second[1]}, "each measurement has fresh prompts"


def test_an_option_changes_only_what_it_is_about():
    plain, other = Plan(load()).open_loop(), Plan(load(cancel=1.0, prefix=9, prefixes=4)).open_loop()
    assert [(o.at, o.prompt_tokens) for o in plain] == [(o.at, o.prompt_tokens) for o in other]


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_intervals_have_the_mean_of_the_rate_and_the_variation_of_the_burstiness(burstiness, variation):
    times = arrivals([Step(100, 100, 400)], burstiness, np.random.default_rng(0))
    intervals = np.diff(times)
    assert intervals.mean() == pytest.approx(0.01, rel=0.03)
    assert intervals.std() / intervals.mean() == pytest.approx(variation, rel=0.05)
    assert times.min() >= 0
    assert times.max() < 400


def test_arrivals_follow_steps_and_ramps():
    steps = [Step(100, 100, 20), Step(300, 300, 20), Step(0, 400, 40), Step(400, 0, 40)]
    times = arrivals(steps, 1.0, np.random.default_rng(0))
    counts, _ = np.histogram(times, bins=[0, 20, 40, 60, 80, 100, 120])
    assert counts == pytest.approx([2000, 6000, 2000, 6000, 6000, 2000], rel=0.08)
    assert (np.diff(times) >= 0).all()


def test_each_request_knows_its_step_and_the_warm_up_comes_before():
    orders = Plan(load(steps=(Step(50, 50, 4), Step(100, 100, 4)), warm_up=2)).open_loop()
    for order in orders:
        assert order.step == (WARM_UP if order.at < 0 else 0 if order.at < 4 else 1)
    counts = [sum(order.step == step for order in orders) for step in (WARM_UP, 0, 1)]
    assert counts == pytest.approx([100, 200, 400], rel=0.3)
    assert orders[0].at > -2


def test_lengths_have_the_moments_of_their_distribution():
    prompt, output = SHAPES["chat"]
    orders = Plan(load(prompt=prompt, output=output, steps=(Step(200, 200, 30),))).open_loop()
    logs = np.log([o.prompt_tokens for o in orders])
    assert np.median(logs) == pytest.approx(6.0, abs=0.05)
    assert {16 <= o.prompt_tokens <= 4000 and 8 <= o.output_tokens <= 1024 for o in orders} == {True}
    uniform = Plan(load(prompt=Lengths("uniform", 1, 3), steps=(Step(200, 200, 5),))).open_loop()
    assert {o.prompt_tokens for o in uniform} == {1, 2, 3}


def test_the_shares_of_cancelled_and_slow_requests():
    orders = Plan(load(cancel=0.3, cancel_after=(1.0, 2.0), slow=0.1, steps=(Step(100, 100, 30),))).open_loop()
    after = [o.cancel_after for o in orders if o.cancel_after is not None]
    assert len(after) / len(orders) == pytest.approx(0.3, abs=0.03)
    assert {1 <= seconds <= 2 for seconds in after} == {True}
    assert sum(o.slow for o in orders) / len(orders) == pytest.approx(0.1, abs=0.02)


def test_the_number_of_requests_is_an_upper_bound():
    assert len(Plan(load(requests=5)).open_loop()) == 5


def test_prompts_share_their_prefix_and_nothing_else():
    plan = Plan(load(prefix=6, prefixes=2))
    prompts = Prompts(plan, TARGET)
    ids = [(order.prefix, prompts.of(order).ids) for order in plan.open_loop()[:40]]
    assert {len(prompt) for _, prompt in ids} == {14}
    assert len({tuple(prompt[:6]) for _, prompt in ids}) == 2
    assert len({tuple(prompt[6:]) for _, prompt in ids}) == 40
    assert all(prompt.min() >= 10 and prompt.max() < 500 for _, prompt in ids)


def test_text_has_the_tokens_that_the_endpoints_tokenizer_makes_of_it():
    plan = Plan(load(prompt=Lengths("fixed", 103, 103)))
    target = Target("http://host", "chat", vocab=500, tokens_per_word=2.0, template_tokens=3.0)
    (message,) = Prompts(plan, target).of(plan.order(0, 0.0, 0)).messages
    assert len(message["content"].split()) == 50


def test_sessions_grow_to_the_context_and_not_beyond():
    plan = Plan(load(sessions=AGENTS))
    ends = []
    for index in range(50):
        session = plan.session(index)
        assert session == plan.session(index)
        context = 0
        for turn in session.turns:
            context += turn.new_tokens + turn.output_tokens
            for forked in [turn.fork] if turn.fork else []:
                assert 1 <= len(forked.turns) <= 3
                assert all(inner.fork is None for inner in forked.turns)
        ends.append(context)
    assert max(ends) <= 1000 == longest(load(sessions=AGENTS))
    assert np.mean(ends) > 900
    thinks = [turn.think_s for index in range(50) for turn in plan.session(index).turns[1:]]
    assert np.mean(thinks) == pytest.approx(1.0, rel=0.15)
    keys = [s.key for i in range(50) for s in [plan.session(i), *(t.fork for t in plan.session(i).turns if t.fork)]]
    assert len(set(keys)) == len(keys) > 100


def test_a_conversation_holds_everything_before_and_a_fork_shares_it():
    prompts = Prompts(Plan(load(sessions=AGENTS, prefix=4)), TARGET)
    talk = prompts.conversation(0)
    first = talk.ask(6).ids
    reading = Reading(keep=True)
    reading.answer_ids = [7, 8, 9]
    talk.answered(reading)
    fork = talk.fork(5)
    second, forked = talk.ask(2).ids, fork.ask(2).ids
    assert second.tolist()[:13] == [*first.tolist(), 7, 8, 9] == forked.tolist()[:13]
    assert len(second) == len(forked) == 15
    assert second.tolist() != forked.tolist()
    assert prompts.conversation(1).ask(6).ids.tolist()[:4] == first.tolist()[:4], "sessions begin with the shared prefix"
    reading.answer_ids, reading.output_tokens = [], 5
    talk.answered(reading)
    assert len(talk.ask(1).ids) == 21, "an answer without ids is replaced by as many random ones"


def test_a_chat_is_sent_back_as_messages():
    talk = Prompts(Plan(load(sessions=AGENTS)), Target("http://host", "chat")).conversation(0)
    talk.ask(3)
    reading = Reading(keep=True)
    reading.answer_text = ["Go", "od"]
    talk.answered(reading)
    roles = [(m["role"], m["content"] == "Good") for m in talk.ask(3).messages]
    assert roles == [("user", False), ("assistant", True), ("user", False)]
