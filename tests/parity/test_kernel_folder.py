"""Tests that compiled kernels can be carried to another machine, and that only intact files of the right set are taken."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from engine.errors import ConfigError
from engine.kernels import kernel_folder
from engine.kernels.hardware import GPUS
from engine.kernels.kernel_folder import KernelSet, Purpose

ROOT = Path(__file__).resolve().parents[2]
PURPOSE = Purpose.of(GPUS["h200"], model={"size": 64}, settings={"block_size": 64})


def test_carried_kernels_are_found_and_not_compiled_again(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests/parity/carry_kernels.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "2 2\n2 0\n", run.stderr[-3000:]


@pytest.fixture
def exported(tmp_path):
    """A folder with one set, of one kernel and one launcher, as `tidegate compile` makes it."""
    cache = tmp_path / "cache"
    for folder, files in {
        "KERNEL": {"k.cubin": b"\x7fELF", "k.json": b"{}", "k.ptx": b"text"},
        "LAUNCHER": {"l.so": b"so"},
    }.items():
        (cache / folder).mkdir(parents=True)
        for name, data in files.items():
            (cache / folder / name).write_bytes(data)
    found = kernel_folder.describe(PURPOSE, ["KERNEL", "LAUNCHER"], cache)
    assert kernel_folder.export(found, cache, tmp_path / "exported") == 8
    return tmp_path / "exported"


def installed(folder, cache) -> KernelSet:
    found = kernel_folder.read(folder, PURPOSE)
    kernel_folder.install(found, folder, cache)
    return found


def test_a_set_holds_what_a_launch_needs_and_others_may_read_it(exported, tmp_path):
    found = installed(exported, tmp_path / "there")
    assert {folder: set(names) for folder, names in found.files.items()} == {
        "KERNEL": {"k.cubin", "k.json"},
        "LAUNCHER": {"l.so"},
    }
    group = msgspec.json.decode((tmp_path / "there/KERNEL/__grp__k.json").read_bytes())["child_paths"]
    assert group == {name: str(tmp_path / "there/KERNEL" / name) for name in ("k.cubin", "k.json")}
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o044 for path in exported.rglob("*"))


@pytest.mark.parametrize("name", ["KERNEL/k.cubin", "KERNEL/k.json", "LAUNCHER/l.so"])
def test_a_changed_or_missing_file_is_refused_by_name(exported, tmp_path, name):
    (exported / name).write_bytes(b"other")
    with pytest.raises(ConfigError, match=f"{name}.* was changed after it was compiled; compile the kernels again"):
        installed(exported, tmp_path / "there")
    (exported / name).unlink()
    with pytest.raises(ConfigError, match=f"{name}.* cannot be read"):
        installed(exported, tmp_path / "there")
    assert not (tmp_path / "there" / name).exists()


def test_a_set_for_another_purpose_is_not_found_and_the_difference_is_named(exported):
    other = msgspec.structs.replace(PURPOSE, triton="0.1", model="{}")
    assert kernel_folder.read(exported, other) is None
    (there,) = kernel_folder.other_purposes(exported)
    assert other.differences(there) == ["the model's shapes", f"triton ({PURPOSE.triton} there, 0.1 here)"]


def test_a_set_that_is_no_json_is_refused_by_name(exported):
    (exported / f"{PURPOSE.name}.json").write_text("[")
    with pytest.raises(ConfigError, match=f"{PURPOSE.name}.json cannot be read"):
        kernel_folder.read(exported, PURPOSE)
    assert kernel_folder.other_purposes(exported) == []


def test_containers_with_equal_process_ids_may_write_at_once(exported, tmp_path, monkeypatch):
    written = []
    real = Path.write_bytes

    def note(path, data):
        written.append(path.name)
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", note)
    for name in ("one", "two"):
        installed(exported, tmp_path / name)
    assert len(written) == len(set(written)) == 8


def test_other_sets_that_cannot_be_read_are_left_out(exported):
    (exported / "folder.json").mkdir()
    assert len(kernel_folder.other_purposes(exported)) == 1


def test_a_folder_is_made_and_tried(tmp_path):
    kernel_folder.prepare(tmp_path / "new" / "folder")
    assert list((tmp_path / "new/folder").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        kernel_folder.prepare(tmp_path / "file")


def test_installing_twice_changes_nothing(exported, tmp_path):
    installed(exported, tmp_path / "there")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "there").rglob("*")}
    installed(exported, tmp_path / "there")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "there").rglob("*")} == before
