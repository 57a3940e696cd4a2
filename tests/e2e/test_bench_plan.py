"""Runs `tidegate bench plan` as a user does: an answer, and what it says of targets and files that cannot be used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.scheduler.cost_file import CostKey, save_costs
from engine.scheduler.cost_table import CostTable

ROOT = Path(__file__).resolve().parents[2]
H200 = "loadtest/costs/h200-llama-8b-bf16.json"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", "bench", "plan", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def slow(tmp_path) -> str:
    """A cost file of a device whose steps take 0.2 s for up to 256 rows, and 0.4 s for 1,000 prompt tokens."""
    table = CostTable([256], [0.2], [100, 1000], [0.2, 0.4], 0.0, 0.0, 0.0)
    save_costs(tmp_path / "slow.json", CostKey("a slow card", "some model", "bfloat16"), "a test", table)
    return str(tmp_path / "slow.json")


def test_a_plan_is_a_table_a_sentence_and_a_line_of_json(slow, tmp_path):
    record = tmp_path / "plans.jsonl"
    words = ["--costs", slow, "--rate", "40", "--ttft-ms", "4000", "--gap-ms", "4000", "--share", "0.9"]
    done = run(*words, "--record", str(record))
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert json.loads(record.read_text()) == line
    (card,) = line["cards"]
    assert card["device"] == "a slow card"
    assert 0.5 < card["kept_rate"] < 5  # a request has 550 prompt tokens, of which at most 2,500 are computed in a second
    assert card["replicas"] == -(-40 // card["kept_rate"])
    last = done.stderr.splitlines()[-1]
    assert last.startswith("For 40 requests/s of chat, 90% within TTFT 4000 ms and gaps of 4000 ms: ")
    assert f"{card['replicas']} replicas of a slow card" in last


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ttft-ms", "20"], "no rate keeps it: the prompt alone takes"),
        (["--shape", "talk"], "shape is 'talk': it must be one of chat, rag, long"),
        (["--costs", "pyproject.toml"], "cost file 'pyproject.toml' (costs): it is not a complete JSON document"),
    ],
)
def test_what_cannot_be_planned_ends_with_one_message(words, message):
    done = run("--costs", H200, "--rate", "10", *words)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
