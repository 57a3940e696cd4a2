"""Tests of the measurement of a disk: what it leaves, and what it says of a disk that fails. No speed is asserted."""

import pytest

from engine.kvcache.disk import rates


def test_all_records_are_written_and_read(tmp_path):
    found = rates.measure(tmp_path, 5000, 7, num_threads=2)
    assert min(found.write_gb_s, found.read_gb_s, found.seconds["read"], found.seconds["write"]) > 0
    assert sum(path.stat().st_size for path in tmp_path.glob("segment-*")) <= rates.file_bytes(5000, 7)
    store = rates.open_store(tmp_path, 5000, 7)
    assert all(store.find(digest) is not None for digest in rates.make_digests(7))
    store.close()


def test_a_record_that_is_lost_meanwhile_is_an_error(tmp_path):
    store = rates.open_store(tmp_path, 5000, 4)
    buffers, digests = [rates.random_buffer(5000)], rates.make_digests(4)
    rates.move(store, digests, buffers, is_read=False)
    for path in tmp_path.glob("segment-*"):
        with path.open("r+b") as file:
            file.truncate(0)
    with pytest.raises(OSError, match="a read failed: "):
        rates.move(store, digests, buffers, is_read=True)
    store.close()


def test_a_folder_that_cannot_be_used_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="the disk tier turned itself off: "):
        rates.measure(tmp_path / "file" / "kv", 5000, 4)
