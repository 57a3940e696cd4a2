"""Tests that `--torch-free` and `--need-torch` divide the tests: each test is in exactly one of the two runs, as CI needs."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# They have tests of every kind: tests that need torch because of their folder, their imports or a mark, and others.
FOLDERS = ("tests/train", "tests/unit/engine/weights", "tests/unit/server/bench")


def collect(folders, *options):
    """Return the ids of the tests in `folders` that a run with `options` would run, and what pytest says."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *options, *folders]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [line for line in run.stdout.splitlines() if "::" in line], run.stdout + run.stderr


def test_each_test_is_in_one_of_the_two_runs():
    whole, output = collect(FOLDERS)
    free, _ = collect(FOLDERS, "--torch-free")
    others, _ = collect(FOLDERS, "--need-torch")
    assert whole, output
    assert sorted(free + others) == sorted(whole)
    assert {folder for folder in FOLDERS if any(id.startswith(folder) for id in free)} == {"tests/unit/server/bench"}
    assert all(any(id.startswith(folder) for id in others) for folder in FOLDERS)


def test_a_mark_from_another_file_is_refused(tmp_path):
    """`--need-torch` reads only the files that import torch or have the mark, so it would not find such a test."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    (tmp_path / "marks.py").write_text("import pytest\n\nslow = pytest.mark.torch\n")
    (tmp_path / "test_one.py").write_text("from marks import slow\n\n@slow\ndef test_one():\n    pass\n")
    ids, output = collect([str(tmp_path)], "--torch-free", "-o", f"pythonpath={ROOT} {tmp_path}", f"--rootdir={tmp_path}")
    assert not ids
    assert "set the mark torch in the test's own file" in output


def test_both_options_together_are_refused():
    assert "leave no test" in collect(FOLDERS, "--torch-free", "--need-torch")[1]
