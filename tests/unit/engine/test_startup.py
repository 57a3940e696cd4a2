"""Tests of the phases of an engine's start, and of the folder for compiled kernels."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from engine import startup
from engine.config import EngineConfig
from engine.core import build_core
from tests.support.tiny_checkpoint import write_tiny_checkpoint


def test_phases_follow_one_another_without_a_gap(monkeypatch):
    times = iter([100.0, 101.5, 104.0])
    monkeypatch.setattr(startup, "time", SimpleNamespace(monotonic=lambda: next(times)))
    clock = startup.StartupClock(before=5.0)
    clock.end("imports")
    clock.end("config")
    assert list(clock.seconds.items()) == [("imports", 6.5), ("config", 2.5)]


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


def test_an_engine_reports_its_phases_in_order(tmp_path):
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


def test_process_seconds_is_the_age_of_the_process():
    before = time.time() - psutil.Process().create_time()
    age = startup.process_seconds()
    assert age == pytest.approx(before, abs=2.0)  # psutil knows the time of the boot only to a second


def test_without_proc_process_seconds_is_the_cpu_time(monkeypatch, tmp_path):
    monkeypatch.setattr(startup, "_STAT", tmp_path / "stat")
    assert startup.process_seconds() >= 0


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Make a home folder in which not even root can write, and a folder for temporary files."""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.touch()  # the home is a file, so no folder can be made in it
    temporary.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    for name in ("TRITON_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "set, so that monkeypatch restores the variable after the test")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    return tmp_path


def chosen():
    startup.keep_kernels()
    return os.environ.get("TRITON_CACHE_DIR")


def test_a_folder_that_the_user_set_is_kept(folders, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/set/by/user")
    assert chosen() == "/set/by/user"


@pytest.mark.parametrize("name", ["HOME", "TRITON_HOME"])
def test_a_writable_home_leaves_triton_its_default(folders, monkeypatch, name):
    monkeypatch.setenv(name, str(folders))
    assert chosen() is None


def test_without_a_writable_home_kernels_go_to_the_users_cache(folders, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders / "cache"))
    assert chosen() == str(folders / "cache" / "tidegate" / "triton")


@pytest.mark.parametrize("cache", [None, "home"])
def test_without_a_cache_kernels_go_to_the_same_temporary_folder_at_each_start(folders, monkeypatch, cache):
    if cache:
        monkeypatch.setenv("XDG_CACHE_HOME", str(folders / cache))
    first = chosen()
    assert Path(first).parent == folders / "tmp"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    assert chosen() == first


def test_a_temporary_folder_that_others_can_write_to_is_not_used(folders, monkeypatch):
    first = chosen()
    Path(first).chmod(0o777)
    monkeypatch.delenv("TRITON_CACHE_DIR")
    assert chosen() != first


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, startup.SPINS),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_the_operator_decides_how_threads_wait(monkeypatch, given, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.environ", os.environ.copy() | given)
    startup.share_cpus()
    assert os.environ.get("GOMP_SPINCOUNT") == expected
