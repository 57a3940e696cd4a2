import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine import startup
from engine.config import EngineConfig
from engine.core import build_core
from tests.support.tiny_checkpoint import write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[3]


def test_phases_follow_one_another_without_a_gap():
    began = time.monotonic()
    clock = startup.StartupClock(before=5.0)
    clock.end("imports")
    time.sleep(0.02)
    clock.end("config")
    assert list(clock.seconds) == ["imports", "config"]
    assert clock.seconds["imports"] >= 5.0
    assert clock.seconds["config"] >= 0.02
    assert sum(clock.seconds.values()) <= 5.0 + time.monotonic() - began


def test_each_end_of_a_phase_is_reported_and_progress_in_between_not_too_often(monkeypatch):
    reports = []
    clock = startup.StartupClock(report=lambda: reports.append(None))
    clock.progress()
    assert len(reports) == 1
    monkeypatch.setattr(startup, "PROGRESS_SECONDS", 3600.0)
    for _ in range(1000):
        clock.progress()
    assert len(reports) == 1
    for phase in ("imports", "config"):
        clock.end(phase)
    assert len(reports) == 3
    monkeypatch.setattr(startup, "PROGRESS_SECONDS", 0.0)
    clock.progress()
    assert len(reports) == 4


def test_an_engine_tells_its_phases_in_order(tmp_path):
    config = EngineConfig(model=str(write_tiny_checkpoint(tmp_path)), runner="fake")
    core = build_core(config, startup.StartupClock(before=3.0))
    assert list(core.info().startup) == ["imports", "config", "ready"]
    assert core.info().startup["imports"] >= 3.0
    assert set(core.info().startup) <= set(startup.PHASES)


@pytest.mark.torch
def test_the_torch_runner_has_every_phase(tmp_path):
    config = EngineConfig(model=str(write_tiny_checkpoint(tmp_path)), load_format="dummy", device="cpu", max_model_len=64)
    core = build_core(config)
    core.close()
    assert list(core.info().startup) == list(startup.PHASES)


def test_a_process_knows_its_age():
    code = "import time; time.sleep(0.5); from engine import startup; print(startup.process_seconds())"
    began = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.4 < float(run.stdout) < time.monotonic() - began + 0.1


def test_without_proc_the_age_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(startup, "_STAT", tmp_path / "stat")
    assert startup.process_seconds() >= 0


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A home that cannot be written to, whoever runs the tests, and the place for temporary files."""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.touch()  # a file: no folder can be made in it
    temporary.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    for name in ("TRITON_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "set and taken away, so that what is set below goes with the test")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    return tmp_path


def chosen():
    startup.keep_kernels()
    return os.environ.get("TRITON_CACHE_DIR")


def test_a_folder_that_was_asked_for_is_kept(folders, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/asked/for")
    assert chosen() == "/asked/for"


@pytest.mark.parametrize("name", ["HOME", "TRITON_HOME"])
def test_a_home_that_can_be_written_to_is_left_to_triton(folders, monkeypatch, name):
    monkeypatch.setenv(name, str(folders))
    assert chosen() is None


def test_kernels_go_to_the_users_cache(folders, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders / "cache"))
    assert chosen() == str(folders / "cache" / "tidegate" / "triton")


@pytest.mark.parametrize("cache", [None, "home"])
def test_or_else_to_the_same_temporary_folder_at_each_start(folders, monkeypatch, cache):
    if cache:
        monkeypatch.setenv("XDG_CACHE_HOME", str(folders / cache))
    first = chosen()
    assert Path(first).parent == folders / "tmp"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    assert chosen() == first


def test_a_temporary_folder_that_others_can_write_to_is_not_run_from(folders, monkeypatch):
    first = chosen()
    Path(first).chmod(0o777)
    monkeypatch.delenv("TRITON_CACHE_DIR")
    assert chosen() != first
