"""Tests that the pages for clients state the targets and times that the engine has."""

import re
from pathlib import Path

import pytest

from engine.scheduler.policy import AGEING_SECONDS, PRIORITY_SECONDS
from engine.slo import SLO_CLASSES
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/slo.md").read_text()
PROTO = (ROOT / "protos/tidegate/v1/inference.proto").read_text()


def in_words(seconds):
    return "none" if seconds is None else f"{seconds:g} s" if seconds >= 1 else f"{seconds * 1000:g} ms"


@pytest.mark.parametrize("slo", SLO_CLASSES.values(), ids=lambda slo: slo.name)
def test_the_table_of_classes_has_their_targets(slo):
    assert f"| `{slo.name}` | {in_words(slo.ttft)} | {in_words(slo.itl)} |" in PAGE


@pytest.mark.parametrize("slo", [slo for slo in SLO_CLASSES.values() if slo.ttft], ids=lambda slo: slo.name)
def test_the_proto_states_the_targets(slo):
    comment = re.search(rf'"{slo.name}" \(([^)]*)\)', PROTO)[1]
    assert re.fullmatch(rf"(first token within )?{in_words(slo.ttft)}, {in_words(slo.itl)}( between tokens)?", comment)


def test_the_defaults_of_settings_are_those_of_the_server():
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \| ([^|]+) \|", PAGE.partition("## Settings")[2].partition("## Metrics")[0], re.M)
    stated = {}
    for names, values in rows:
        stated |= dict(zip(re.findall(r"`(\w+)`", names), values.strip().split(", "), strict=True))
    assert {"slo_class", "batching", "max_batch", "step_low_ms"} <= stated.keys()
    for name, value in stated.items():
        default = Settings.model_fields[name].default
        assert value == ("none" if default is None else default if isinstance(default, str) else f"{default:.10g}"), name


def test_the_worth_of_priority_and_of_waiting_is_stated():
    assert f"each step of it counts as {PRIORITY_SECONDS:g} seconds of\nwaiting" in PAGE
    assert f"each step counts as {PRIORITY_SECONDS:g} seconds of waiting" in PROTO
    assert f"a request that has waited {AGEING_SECONDS:g} seconds counts as one class higher" in PAGE
