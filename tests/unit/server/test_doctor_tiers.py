"""Tests what `tidegate doctor` measures of the KV cache's tiers. No speed is asserted."""

import re
from pathlib import Path

import pytest

from engine.config import CacheConfig, EngineConfig
from engine.kvcache.disk.outcome import Outcome
from engine.kvcache.disk.rates import file_bytes
from server.doctor_tiers import disk, tiers
from tests.support.disk_store import digest_of, is_right, open_store, scanned, write
from tests.support.tiny_checkpoint import write_tiny_checkpoint

RECORD = 8192
SPEED = r"\d+\.\d\d GB/s"
LOADS = r"that loads [\d,]+ tokens/s: it helps if the device computes prompts more slowly"


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def config(folder, *, runner="torch", **cache):
    return EngineConfig(model=str(folder), runner=runner, device="cpu", cache=CacheConfig(**cache))


def test_nothing_is_measured_without_a_tier(tmp_path):
    assert tiers(config(tmp_path), has_torch=True) == []


@pytest.mark.torch
def test_both_tiers_are_measured_with_the_models_own_blocks(tmp_path):
    folder = tmp_path / "kv"
    found = tiers(
        config(
            write_tiny_checkpoint(tmp_path / "model"),
            host_tier_bytes=4 << 20,
            disk_tier_folder=str(folder),
            disk_tier_bytes=1 << 20,
        ),
        has_torch=True,
    )
    assert [(finding.what, finding.state) for finding in found] == [("host tier", "ok"), ("disk tier", "ok")]
    assert re.fullmatch(f"{SPEED} from the device, {SPEED} to it; {LOADS}", found[0].text)
    way = r"by (direct I/O|the page cache), in records of [1-9]\d+ bytes"
    assert re.fullmatch(f"writes {SPEED} and reads {SPEED} {way}; {LOADS}", found[1].text)
    assert not folder.exists()


@pytest.mark.torch
def test_a_host_tier_that_cannot_hold_a_block_is_missing(tmp_path):
    (found,) = tiers(config(write_tiny_checkpoint(tmp_path), host_tier_bytes=5), has_torch=True)
    assert (found.what, found.state) == ("host tier", "missing")
    assert found.text.startswith("host_tier_bytes is 5, and one block takes")


def test_the_disk_is_measured_for_a_fake_runner_too(tmp_path):
    fake = config(tmp_path, runner="fake", disk_tier_folder=str(tmp_path / "a" / "kv"), disk_tier_bytes=8 << 20)
    assert [(finding.what, finding.state) for finding in tiers(fake, has_torch=False)] == [
        ("host tier", "note"),
        ("disk tier", "ok"),
    ]
    assert left_in(tmp_path) == []
    (only,) = tiers(config(tmp_path, host_tier_bytes=1 << 20), has_torch=False)
    assert only == ("host tier", "note", "not measured: that needs torch")


def test_a_server_may_use_the_folder_meanwhile_and_keeps_its_records(tmp_path):
    store = scanned(open_store(tmp_path, 8))
    digest = digest_of(1)
    assert write(store, digest) is Outcome.OK
    before = left_in(tmp_path)
    content = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert disk(tmp_path, 1 << 20, RECORD, 16).state == "ok"
    assert left_in(tmp_path) == before
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == content
    assert is_right(store, digest)
    assert store.health.is_on
    store.close()


@pytest.mark.parametrize(
    ("max_bytes", "state", "says"),
    [
        (file_bytes(RECORD, 1), "ok", "in records of 8192 bytes"),
        (file_bytes(RECORD, 1) - 1, "missing", f"disk_tier_bytes is {file_bytes(RECORD, 1) - 1}, and a file of one record takes"),
    ],
)
def test_a_cap_that_holds_no_record_is_missing(tmp_path, max_bytes, state, says):
    found = disk(tmp_path, max_bytes, RECORD, 16)
    assert found.state == state
    assert says in found.text


def test_a_folder_that_cannot_be_one_is_reported(tmp_path):
    (tmp_path / "file").write_text("x")
    assert disk(tmp_path / "file", 1 << 20, RECORD, 16).state == "missing"
    found = disk(tmp_path / "file" / "kv", 1 << 20, RECORD, 16)
    assert found.state == "note"
    assert "Not a directory" in found.text
    assert left_in(tmp_path) == ["file"]
