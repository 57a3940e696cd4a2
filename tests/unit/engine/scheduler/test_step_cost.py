"""Tests of StepCost: what it learns from noisy devices, how it notices that it is wrong, and its inverted predictions."""

import logging
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler.cost_table import CostTable, row_sizes, token_knots
from engine.scheduler.limits import StepShape, pairs
from engine.scheduler.step_cost import StepCost
from tests.unit.engine.scheduler.devices import (
    CPU,
    FLAT,
    H200,
    ColdDevice,
    CompilingDevice,
    Device,
    chat_steps,
    median_error,
    scaled,
)

ROWS, TOKENS = 256, 8192


def learnt(table: CostTable, num: int = 1000, *, seed: CostTable | None = None, **device) -> StepCost:
    cost = StepCost.of_size(ROWS, TOKENS, seed)
    Device(table, **device).teach(cost, chat_steps(num))
    return cost


@pytest.mark.parametrize("table", [H200, CPU, scaled(H200, 0.1)], ids=["h200", "cpu", "fast"])
def test_a_device_is_learnt_from_nothing_in_spite_of_noise_and_pauses(table):
    cost = learnt(table)
    assert median_error(cost, table, chat_steps(500, seed=8)) < 0.03
    assert cost.trusted
    assert 0.01 < cost.error < 0.05  # the noise is 3%
    assert 1.03 < cost.spread < 1.15


def test_decodes_and_prompts_are_each_predicted_within_a_tenth():
    cost = learnt(H200, noise=0.1)
    shapes = list(chat_steps(500, seed=8))
    for with_prompts in (False, True):
        assert median_error(cost, H200, (s for s in shapes if bool(s.prompt_tokens) is with_prompts)) < 0.1


def test_the_share_of_kv_and_of_attention_is_told_apart():
    table = learnt(H200, 3000).table
    assert table.kv_token_seconds == pytest.approx(H200.kv_token_seconds, rel=0.1)
    assert table.attention_pair_seconds == pytest.approx(H200.attention_pair_seconds, rel=0.1)


def test_nothing_is_trusted_before_both_kinds_of_steps_were_measured():
    cost = StepCost.of_size(ROWS, TOKENS)
    assert not cost.trusted
    Device(H200).teach(cost, (shape for shape in chat_steps(1000) if not shape.prompt_tokens))
    assert not cost.trusted
    Device(H200).teach(cost, chat_steps(600, seed=9))
    assert cost.trusted


def test_decodes_are_trusted_for_themselves_while_prompts_are_not_known():
    cost = StepCost.of_size(ROWS, TOKENS)
    Device(H200).teach(cost, iter([StepShape(0, 0, 400, 80_000)]))
    assert not cost.trusted_for_decodes
    Device(H200).teach(cost, iter([StepShape(4, 1600 + 4 * i, 0, 0) for i in range(10)]))
    assert cost.trusted_for_decodes
    assert not cost.trusted


def test_decodes_are_not_trusted_for_themselves_while_prompts_are_known_to_be_wrong():
    cost = StepCost.of_size(ROWS, TOKENS, H200)
    for _ in range(40):
        cost.observe(StepShape(8, 4000, 500, 125_000), 5 * H200.predict(StepShape(8, 4000, 500, 125_000)))
    assert not cost.trusted_for_decodes


def test_ten_steps_that_no_table_predicts_earn_no_trust():
    cost = StepCost.of_size(ROWS, TOKENS)
    for step in range(60):
        cost.observe(StepShape(4, 1600, 0, 0), (0.004, 0.012, 0.03)[step % 3])
        cost.observe(StepShape(4, 1600, 400, 80_000), (0.01, 0.03, 0.1)[step % 3])
    assert not cost.trusted_for_decodes


@pytest.mark.parametrize("noise", [0.05, 0.15])
@pytest.mark.parametrize("seed", range(3))
def test_trust_does_not_come_and_go_with_noise(noise, seed):
    cost, device, seen = StepCost.of_size(ROWS, TOKENS), Device(H200, noise=noise), []
    for shape in chat_steps(1500, seed):
        cost.observe(shape, device.seconds(shape))
        if not seen or seen[-1] is not cost.trusted:
            seen.append(cost.trusted)
    assert seen == [False, True]


def test_a_slow_first_step_of_a_size_is_not_believed():
    cost = StepCost.of_size(ROWS, TOKENS)
    Device(H200, outliers=0.0).teach(cost, chat_steps(200, most_tokens=600))
    cost.observe(StepShape(0, 0, 4000, 8_000_000), 3.0)
    assert cost.predict(StepShape(0, 0, 4000, 8_000_000)) < 0.2
    cost.observe(StepShape(0, 0, 4000, 8_000_000), H200.predict(StepShape(0, 0, 4000, 8_000_000)))
    assert cost.knows(StepShape(0, 0, 4000, 0))
    assert cost.predict(StepShape(0, 0, 4000, 8_000_000)) < 0.12


@pytest.mark.parametrize("make", [ColdDevice, CompilingDevice])
@pytest.mark.parametrize("seed", range(3))
def test_a_device_that_is_slow_at_first_is_learnt_nevertheless(make, seed, caplog):
    cost = StepCost.of_size(ROWS, TOKENS)
    with caplog.at_level(logging.WARNING):
        make(H200).teach(cost, chat_steps(600, seed))
    assert caplog.records == []
    assert cost.trusted
    assert median_error(cost, H200, chat_steps(500, seed=8)) < 0.05


def test_what_was_measured_while_a_device_was_slow_is_forgotten_for_sizes_that_do_not_come_again():
    cost = StepCost.of_size(ROWS, TOKENS)
    for _ in range(6):
        cost.observe(StepShape(0, 0, 512, 0), 0.2)  # 11.5 ms once the device is warm
    for _ in range(12):
        cost.observe(StepShape(4, 1600, 188, 18_000), H200.predict(StepShape(4, 1600, 188, 18_000)))
    assert cost.predict(StepShape(0, 0, 512, 0)) < 2 * H200.predict(StepShape(0, 0, 512, 0))


@pytest.mark.parametrize("table", [H200, CPU, FLAT], ids=["h200", "cpu", "flat"])
def test_larger_batches_of_decodes_are_predicted_to_take_longer_and_not_far_too_long(table):
    """A GPU waits for the same weights for 4 decodes and for 256. In proportion, 256 would seem to take 64 times as long."""
    cost = StepCost.of_size(ROWS, TOKENS)
    for rows in (1, 4):
        for _ in range(4):
            cost.observe(StepShape(rows, 0, 0, 0), table.predict(StepShape(rows, 0, 0, 0)))
    for rows in (16, 64):
        truth = table.predict(StepShape(rows, 0, 0, 0))
        assert (
            0.95 * truth < cost.predict(StepShape(rows, 0, 0, 0)) <= 0.3 * rows / 4 * cost.predict(StepShape(4, 0, 0, 0)) + truth
        )


def test_first_steps_do_not_make_kv_dear_while_its_cost_is_not_known():
    cost, device = StepCost.of_size(ROWS, TOKENS), Device(H200, noise=0.1)
    device.teach(cost, iter([StepShape(0, 0, 500, 125_000)] * 4 + [StepShape(1, 500 + i, 0, 0) for i in range(60)]))
    assert cost.predict(StepShape(64, 64 * 700, 0, 0)) < 4 * H200.predict(StepShape(64, 64 * 700, 0, 0)) + 64 / 4 * 4e-3


def test_a_seed_is_trusted_at_once_and_predicts_what_it_says():
    cost = StepCost.of_size(ROWS, TOKENS, H200)
    assert cost.trusted
    assert cost.predict(StepShape(64, 20_000, 0, 0)) == pytest.approx(4.4e-3 + 20_000 * 3.5e-8)
    assert cost.predict(StepShape(64, 20_000, 448, 10_000)) == pytest.approx(11.5e-3 + 20_000 * 3.5e-8 + 10_000 * 8.5e-10)


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_a_table_wrong_by_three_times_is_noticed_logged_once_and_learnt_again(factor, caplog):
    truth, cost, device = scaled(H200, factor), StepCost.of_size(ROWS, TOKENS, H200), Device(scaled(H200, factor))
    with caplog.at_level(logging.WARNING):
        device.teach(cost, chat_steps(40))
        assert not cost.trusted
        device.teach(cost, chat_steps(400, seed=4))
    assert cost.trusted
    assert median_error(cost, truth, chat_steps(500, seed=8)) < 0.05
    assert sorted(record.kind for record in caplog.records) == ["decodes", "prompts"]
    for record in caplog.records:
        assert record.measured_ms / record.predicted_ms == pytest.approx(factor, rel=0.1)


@pytest.mark.parametrize("seed", range(4))
def test_a_table_that_is_learnt_for_the_first_time_is_not_called_wrong(seed, caplog):
    """The batch of a server grows from nothing, so that larger steps keep coming that no step has shown yet."""
    cost, device = StepCost.of_size(ROWS, TOKENS), Device(H200)
    with caplog.at_level(logging.WARNING):
        for scale in range(1, 40):
            shapes = chat_steps(20, seed=seed * 40 + scale, most_rows=5 * scale)
            device.teach(cost, shapes)
    assert caplog.records == []
    assert cost.trusted


def test_a_device_that_becomes_slower_is_followed():
    cost = learnt(H200)
    Device(scaled(H200, 1.3)).teach(cost, chat_steps(1500, seed=5))
    assert median_error(cost, scaled(H200, 1.3), chat_steps(500, seed=8)) < 0.05


def test_one_wrong_size_of_a_seed_is_learnt_again():
    wrong = H200._replace(decode_seconds=[4.0e-3, 4.4e-3, 4.9e-3, 5.5e-3, 20e-3])
    cost = StepCost.of_size(ROWS, TOKENS, wrong)
    steps = [
        shape
        for _ in range(400)
        for shape in (StepShape(250, 100_000, 0, 0), StepShape(60, 20_000, 0, 0), StepShape(2, 900, 0, 0))
    ]
    Device(H200).teach(cost, iter(steps))
    assert cost.predict(StepShape(250, 100_000, 0, 0)) == pytest.approx(10.2e-3, rel=0.1)
    assert cost.predict(StepShape(60, 20_000, 0, 0)) == pytest.approx(5.1e-3, rel=0.1)


def test_a_compilation_in_one_step_changes_no_prediction():
    cost = learnt(H200, outliers=0.0)
    before = [cost.predict(shape) for shape in chat_steps(50, seed=8)]
    cost.observe(StepShape(64, 20_000, 500, 100_000), 30.0)
    cost._fit.refit()
    assert [cost.predict(shape) for shape in chat_steps(50, seed=8)] == pytest.approx(before, rel=0.02)


def test_steps_that_were_not_measured_or_were_empty_teach_nothing():
    cost = learnt(H200)
    before = cost.table
    for shape, seconds in ((StepShape(8, 100, 0, 0), 0.0), (StepShape(8, 100, 0, 0), math.nan), (StepShape(0, 0, 0, 0), 0.5)):
        for _ in range(200):
            cost.observe(shape, seconds)
    assert cost.table == before


def test_larger_steps_than_any_measured_are_expected_to_cost_in_proportion():
    cost = StepCost.of_size(ROWS, TOKENS)
    for _ in range(64):
        cost.observe(StepShape(0, 0, 512, 0), 0.3)
    assert cost.predict(StepShape(0, 0, 4096, 0)) == pytest.approx(2.4, rel=0.01)
    assert cost.predict(StepShape(0, 0, 32, 0)) == pytest.approx(0.3, rel=0.01)


@given(data=st.data())
def test_predictions_never_fall_when_a_step_grows(data):
    cost = LEARNT[data.draw(st.sampled_from(sorted(LEARNT)))]
    numbers = st.integers(0, 10_000)
    small = StepShape(*(data.draw(numbers) for _ in StepShape._fields))
    large = StepShape(*(value + data.draw(numbers) for value in small))
    assert 0 <= cost.predict(small) <= cost.predict(large) < math.inf


LEARNT = {
    "seed": StepCost.of_size(ROWS, TOKENS, H200),
    "few": learnt(H200, 30),
    "many": learnt(H200, 500),
    "noise": learnt(CPU, 300, noise=0.5, outliers=0.1),
}


@given(
    seconds=st.floats(0, 1),
    decodes=st.integers(0, 300),
    kv_tokens=st.integers(0, 300_000),
    context=st.integers(0, 130_000),
    most=st.integers(0, 10_000),
    name=st.sampled_from(sorted(LEARNT)),
)
def test_the_number_of_prompt_tokens_within_a_time_is_the_largest_one(seconds, decodes, kv_tokens, context, most, name):
    cost = LEARNT[name]

    def predict(tokens: int) -> float:
        return cost.predict(StepShape.with_chunk(decodes, kv_tokens, tokens, context))

    found = cost.prompt_tokens_within(seconds, decodes=decodes, kv_tokens=kv_tokens, context=context, most=most)
    assert 0 <= found <= most
    assert found == 0 or predict(found) <= seconds
    assert found == most or predict(found + 1) > seconds


def test_the_time_of_a_long_prompt_is_the_sum_of_its_steps():
    cost, kv_tokens = StepCost.of_size(ROWS, TOKENS, H200), 64 * 700
    computed = total = 0
    while computed < 100_000:
        tokens = min(1000, 99_500 - computed) or 500
        total += cost.predict(StepShape.with_chunk(64, kv_tokens, tokens, computed))
        computed += tokens
    predicted = cost.prompt_seconds(100_000, pairs(100_000, 0), decodes=64, kv_tokens=kv_tokens, budget=1000)
    assert predicted == pytest.approx(total, rel=0.01)
    assert predicted == pytest.approx(100 * (22.6e-3 + 1.6e-3 + 1.4e-3) + 5e9 * 8.5e-10, rel=0.05)
    assert cost.prompt_seconds(0, 0, decodes=64, kv_tokens=kv_tokens, budget=1000) == 0


@pytest.mark.parametrize(
    ("make", "largest"),
    [
        (row_sizes, 1),
        (row_sizes, 100),
        (row_sizes, 256),
        (row_sizes, 1000),
        (token_knots, 1),
        (token_knots, 512),
        (token_knots, 8000),
    ],
)
def test_sizes_ascend_up_to_the_largest(make, largest):
    sizes = make(largest)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == largest


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_small_steps_do_not_change_what_large_ones_are_predicted_to_take(factor):
    """A first request reads little KV. That its steps take longer than seeded says nothing about the cost of a token of KV."""
    cost = StepCost.of_size(256, 8192, scaled(H200, factor))
    for step in range(60):
        shape = StepShape(1, 100 + step, 0, 0)
        cost.observe(shape, H200.predict(shape))
    assert cost.predict(StepShape(1, 160, 0, 0)) == pytest.approx(H200.predict(StepShape(1, 160, 0, 0)), rel=0.02)
    large = StepShape(256, 200_000, 0, 0)
    assert 0.9 * min(1, factor) < cost.predict(large) / H200.predict(large) < 1.1 * max(1, factor)


def test_the_cost_of_kv_is_learnt_although_it_was_seeded_ten_times_too_small():
    cost = StepCost.of_size(256, 8192, H200._replace(kv_token_seconds=H200.kv_token_seconds / 10))
    for step in range(1500):
        shape = StepShape(64, 20_000 + 10 * (step * 37 % 1500), 0, 0)
        cost.observe(shape, H200.predict(shape))
    for shape in (StepShape(64, 20_000, 0, 0), StepShape(64, 40_000, 0, 0)):
        assert cost.predict(shape) == pytest.approx(H200.predict(shape), rel=0.05)
