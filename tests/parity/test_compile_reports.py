"""Tests that a process reports each kernel that it compiles.

Triton's interpreter compiles nothing, so the test starts a process without the interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_compile_is_reported(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests/parity/compile_reported.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.splitlines() == ["1 1", "2 1"], run.stderr[-3000:]
