"""Tests the folder of the disk tier: one process at a time, and a key that outlives it."""

import errno
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.kvcache.disk import folder as folder_module
from engine.kvcache.disk.folder import Folder
from engine.kvcache.disk.outcome import Outcome, of_error
from tests.support.disk_store import open_store, wait_for
from tests.support.small_disk import small_disk

ROOT = Path(__file__).resolve().parents[5]
HOLD = """
import sys
from pathlib import Path
from engine.kvcache.disk.folder import Folder
Folder(Path(sys.argv[1])).claim()
print("claimed", flush=True)
sys.stdin.read()
"""


def key_in(path):
    folder = Folder(path)
    folder.claim()
    folder.release()
    return folder.key


def test_a_second_process_is_told_which_folder_is_in_use_and_by_whom(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "kv")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(ConfigError) as refused:
            open_store(tmp_path / "kv", 4)
        assert str(tmp_path / "kv") in refused.value.message
        assert f"process {holder.pid}" in refused.value.message
        assert refused.value.param == "cache.disk_tier_folder"
        holder.kill()
    open_store(tmp_path / "kv", 4).close()


def test_the_files_are_the_owners_alone(tmp_path):
    open_store(tmp_path / "kv", 4).close()
    assert stat.S_IMODE((tmp_path / "kv").stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "kv").iterdir()} == {0o600}


def test_the_key_stays_the_same(tmp_path):
    key = key_in(tmp_path / "kv")
    assert len(key) == 32
    assert key_in(tmp_path / "kv") == key
    assert key_in(tmp_path / "other") != key


@pytest.mark.parametrize("content", [b"", b"part of a key", bytes(33)])
def test_a_file_that_holds_no_whole_key_is_replaced(tmp_path, content):
    (tmp_path / "key").write_bytes(content)
    key = key_in(tmp_path)
    assert (tmp_path / "key").read_bytes() == key
    assert key_in(tmp_path) == key


def test_a_given_key_is_not_written(tmp_path):
    folder = Folder(tmp_path, bytes(32))
    folder.claim()
    assert folder.key == bytes(32)
    assert not (tmp_path / "key").exists()


def test_a_folder_that_was_made_again_gets_the_same_key(tmp_path):
    folder = Folder(tmp_path / "kv")
    folder.claim()
    key = folder.key
    shutil.rmtree(tmp_path / "kv")
    assert not folder.is_same()
    folder.claim()
    assert folder.is_same()
    assert (tmp_path / "kv" / "key").read_bytes() == folder.key == key


def test_a_key_that_was_used_before_the_folder_could_be_made_is_written(tmp_path):
    folder = Folder(tmp_path / "kv")
    key = folder.key
    folder.claim()
    assert (tmp_path / "kv" / "key").read_bytes() == folder.key == key


def test_a_valid_key_that_could_not_be_read_at_the_start_is_never_replaced(tmp_path, monkeypatch, caplog):
    key = key_in(tmp_path / "kv")

    def fail(path):
        raise OSError(errno.EIO, "as the test wants it", str(path))

    now = [0.0]
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "_read_key", fail)
        store = open_store(tmp_path / "kv", 4, clock=lambda: now[0])
    assert store.health.reason is Outcome.IO_ERROR
    now[0] = 5.0
    wait_for(store, lambda: store.health.reason is not Outcome.IO_ERROR)
    assert store.health.reason is Outcome.OTHER_KEY
    assert "the disk tier is off: other key" in caplog.text
    assert (tmp_path / "kv" / "key").read_bytes() == key
    assert store.close()
    assert key_in(tmp_path / "kv") == key


def test_a_folder_whose_file_system_was_unmounted_is_not_made_below_it(tmp_path):
    with small_disk(tmp_path / "small") as disk:
        folder = Folder(disk / "kv")
        folder.claim()
        folder.release()
    (tmp_path / "small").mkdir(exist_ok=True)
    with pytest.raises(OSError, match="not mounted") as refused:
        folder.claim()
    assert of_error(refused.value) is Outcome.GONE
    assert list((tmp_path / "small").iterdir()) == []


def test_a_later_claim_makes_no_parents(tmp_path):
    folder = Folder(tmp_path / "a" / "kv")
    folder.claim()
    folder.release()
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        folder.claim()
    assert not (tmp_path / "a").exists()


def test_a_lock_is_not_followed_to_another_place(tmp_path):
    (tmp_path / "kv").mkdir()
    (tmp_path / "target").write_bytes(b"mine")
    (tmp_path / "kv" / "lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic links"):
        Folder(tmp_path / "kv").claim()
    assert (tmp_path / "target").read_bytes() == b"mine"


def test_a_file_in_the_place_of_the_folder_stops_the_start(tmp_path):
    (tmp_path / "kv").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"^cache\.disk_tier_folder is .*/kv, which is a file") as refused:
        open_store(tmp_path / "kv", 4)
    assert refused.value.param == "cache.disk_tier_folder"


def test_a_wrong_setting_leaves_the_folder_unlocked(tmp_path):
    with pytest.raises(ConfigError, match=r"^cache\.disk_tier_bytes is 4096, .* one record takes 16384") as refused:
        open_store(tmp_path / "kv", 4, max_bytes=4096)
    assert refused.value.param == "cache.disk_tier_bytes"
    with pytest.raises(ConfigError, match="32 bytes"):
        open_store(tmp_path / "kv", 4, key=b"short")
    open_store(tmp_path / "kv", 4).close()


def test_closing_gives_back_all_descriptors(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        open_store(tmp_path / "kv", 8).close()
    assert len(os.listdir("/proc/self/fd")) == before
