"""Tests that the kernels that are found ahead of time are all that steps launch: random steps launch no others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parity.plan_kernels import MODELS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("model", MODELS)
def test_random_steps_launch_only_kernels_that_were_found_ahead_of_time(model):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests/parity/plan_kernels.py"), model, "1"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "planned\n", run.stderr[-3000:]
