"""Tests of Accuracy: each tenant's predictions are corrected by its own errors."""

import math
import random

import pytest

from engine.scheduler.accuracy import FIRST_SPREAD, MOST_TENANTS, SURE, AccuracyByTenant


def teach(accuracy: AccuracyByTenant, tenant: str, usual: float, spread: float, num: int = 400) -> None:
    """Let waits of `tenant` last exp(`usual` ± `spread`) times their prediction without a correction."""
    rng = random.Random(1)
    for _ in range(num):
        wait = usual + rng.gauss(0, spread)
        accuracy.observe(tenant, wait - math.log(accuracy.of(tenant).factor), telling=True)


def test_the_errors_of_one_tenant_do_not_change_the_predictions_of_another():
    accuracy = AccuracyByTenant()
    teach(accuracy, "calm", -0.3, 0.1)
    before = accuracy.of("calm").factor, accuracy.of("calm").margin
    teach(accuracy, "flood", 0.4, 0.4)
    assert (accuracy.of("calm").factor, accuracy.of("calm").margin) == before
    assert before == pytest.approx((math.exp(-0.3), math.exp(SURE * 0.1)), rel=0.1)
    assert accuracy.of("flood").factor == pytest.approx(math.exp(0.4), rel=0.25)
    assert accuracy.of("flood").margin > 1.4 > accuracy.of("calm").margin


def test_a_new_tenant_begins_with_the_figures_of_all():
    accuracy = AccuracyByTenant()
    assert accuracy.of("new").margin == math.exp(SURE * FIRST_SPREAD)
    teach(accuracy, "old", 0.3, 0.05)
    assert accuracy.of("new").factor == accuracy.of("old").factor == accuracy.all.factor
    accuracy.observe("new", 0.1, telling=True)
    assert accuracy.of("new") is not accuracy.of("old")


def test_the_figures_of_all_are_between_those_of_the_tenants():
    accuracy = AccuracyByTenant()
    for _ in range(200):
        teach(accuracy, "a", -0.3, 0.0, num=1)
        teach(accuracy, "b", 0.3, 0.0, num=1)
    assert accuracy.of("a").factor < 0.8
    assert accuracy.of("b").factor > 1.25
    assert 0.9 < accuracy.all.factor < 1.1


def test_only_the_tenants_that_were_observed_last_are_kept():
    accuracy = AccuracyByTenant()
    teach(accuracy, "first", 0.5, 0.0)
    teach(accuracy, "kept", 0.5, 0.0)
    factor = accuracy.of("first").factor
    for number in range(MOST_TENANTS - 1):
        accuracy.observe(f"t{number}", 0.0, telling=True)
        accuracy.observe("kept", 0.0, telling=True)
    assert accuracy.of("first") is accuracy.all
    assert accuracy.of("kept") is not accuracy.all
    assert factor != accuracy.all.factor
