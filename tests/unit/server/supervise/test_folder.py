"""Tests of RunFolder: its lock, the removal of abandoned folders, and what happens if somebody deletes the folder."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest

from engine.errors import ConfigError
from server.supervise.folder import PREFIX, RunFolder, remove_abandoned
from tests.support.children import ROOT

OWNER = """
import sys, tempfile
from server.supervise.folder import RunFolder
print(RunFolder.make().path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def owner_process(folder):
    """Start a process that makes a run folder in `folder`. Returns the process and the run folder's path."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, process.stdout.readline().strip()


def test_a_folder_is_private_and_is_removed_whole(temporary):
    folder = RunFolder.make()
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert folder.metrics.is_dir()
    (folder.metrics / "file").write_text("x")
    folder.remove()
    assert os.listdir(temporary) == []


def test_a_start_removes_the_folders_of_killed_servers_alone(temporary):
    killed, its_folder = owner_process(temporary)
    alive, living_folder = owner_process(temporary)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (temporary / "tidegate-triton-0").mkdir()
    (temporary / "another").mkdir()
    (temporary / (PREFIX + "link")).symlink_to(temporary / "another")
    (temporary / (PREFIX + "file")).touch()
    try:
        mine = RunFolder.make()
        remove_abandoned(temporary)  # the start of a second server calls this too
        left = {str(temporary / name) for name in os.listdir(temporary)}
        others = {str(temporary / name) for name in ("tidegate-triton-0", "another", PREFIX + "link", PREFIX + "file")}
        assert left == {str(mine.path), living_folder, *others}
        assert its_folder not in left
        mine.remove()
    finally:
        for process in (killed, alive):
            process.kill()
            process.communicate()


@pytest.mark.parametrize("victim", ["", "metrics"], ids=["the folder", "the metrics in it"])
def test_what_was_deleted_is_made_again_and_still_locked(temporary, victim):
    folder = RunFolder.make()
    assert not folder.restore()
    shutil.rmtree(folder.path / victim)
    assert folder.restore()
    assert folder.metrics.is_dir()
    assert folder.path.stat().st_mode & 0o777 == 0o700
    remove_abandoned(temporary)
    assert folder.path.exists()
    assert not folder.restore()
    folder.remove()
    assert os.listdir(temporary) == []


def test_a_path_that_became_something_else_is_not_used(temporary):
    folder = RunFolder.make()
    folder.path.rename(temporary / "moved")
    (temporary / "elsewhere").mkdir()
    folder.path.symlink_to(temporary / "elsewhere")
    with pytest.raises(OSError, match="is now something else"):
        folder.restore()
    folder.remove()
    assert folder.path.is_symlink()
    assert os.listdir(temporary / "elsewhere") == []


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_no_usable_temporary_folder_is_a_bad_setting(temporary, monkeypatch, kind):
    path = temporary / "there"
    if kind == "file":
        path.touch()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    with pytest.raises(ConfigError, match="set TMPDIR"):
        RunFolder.make()


@pytest.mark.parametrize("moment", ["mkdtemp", "open"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_new_folder_that_another_start_removes_before_it_is_locked_is_made_again(temporary, monkeypatch, moment, times):
    owner, name = {"mkdtemp": (tempfile, "mkdtemp"), "open": (os, "open")}[moment]
    original, made = getattr(owner, name), []

    def followed_by_another_start(*args, **kwargs):
        result = original(*args, **kwargs)
        if len(made) < times:
            made.append(result)
            with monkeypatch.context() as undone:
                undone.setattr(owner, name, original)
                remove_abandoned(temporary)
            assert os.listdir(temporary) == []
        return result

    monkeypatch.setattr(owner, name, followed_by_another_start)
    folder = RunFolder.make()
    assert len(made) == times
    assert os.listdir(temporary) == [folder.path.name]
    folder.remove()


@pytest.mark.parametrize("restores", [False, True], ids=["at the start", "after a deletion"])
def test_a_lock_that_the_file_system_refuses_leaves_no_descriptor_and_no_folder(temporary, monkeypatch, restores):
    folder = RunFolder.make() if restores else None
    if folder is not None:
        shutil.rmtree(folder.path)
    before = os.listdir("/proc/self/fd")

    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as refused:
        refused.setattr(fcntl, "flock", refuse)
        with pytest.raises(OSError if restores else ConfigError, match="No locks available"):
            folder.restore() if folder is not None else RunFolder.make()
    assert os.listdir("/proc/self/fd") == before
    if folder is None:
        assert os.listdir(temporary) == []
    else:
        folder.restore()
        folder.remove()


def test_a_folder_for_metrics_that_cannot_be_made_stops_no_process(temporary, caplog):
    folder = RunFolder.make()
    folder.metrics.rmdir()
    folder.metrics.touch()
    for _ in range(3):
        assert folder.restore() is False
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "API workers keep their metrics in memory" in caplog.text
    folder.metrics.unlink()
    assert folder.restore() is True
    assert folder.metrics.is_dir()
    folder.remove()


def test_a_folder_is_made_again_with_its_parents(temporary):
    folder = RunFolder.make()
    shutil.rmtree(temporary)
    assert folder.restore() is True
    assert folder.metrics.is_dir()
    folder.remove()
