"""Tests the I/O half on real files: direct and plain I/O give the same bytes, and files never exceed the cap."""

import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kvcache.disk.folder import Folder
from engine.kvcache.disk.outcome import Outcome
from engine.kvcache.disk.record_files import MAX_SEGMENTS, RecordFiles, Sizes
from engine.kvcache.disk.records import HEADER_BYTES, PAGE, Header, RecordFormat
from engine.kvcache.disk.scan import Stamps
from tests.support.disk_store import digest_of, payload_of

FAMILY = b"f" * 16
ODD_SIZES = [1, 100, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 70_001]


@pytest.fixture
def opened(tmp_path):
    """Yield a function that opens the first segment of a folder."""
    opened = []

    def open_files(num_bytes, *, direct=True, slots=4, folder=tmp_path):
        claimed = Folder(folder)
        claimed.claim()
        form = RecordFormat(num_bytes, b"", claimed.key)
        sizes = Sizes(form.stride, PAGE + slots * form.stride, 1 << 30)
        opened.append(RecordFiles(claimed, form, sizes, direct=direct, stamp=Stamps().next))
        opened[-1].open_segment()
        return opened[-1]

    yield open_files
    for files in opened:
        files.close()
        files.folder.release()


def aligned(num_bytes, offset=0):
    """Return a buffer whose address is `offset` bytes past the beginning of a page."""
    return memoryview(mmap.mmap(-1, num_bytes + PAGE))[offset : offset + num_bytes]


@pytest.mark.parametrize("num_bytes", ODD_SIZES)
@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("offset", [0, 8])
def test_direct_and_plain_io_read_what_the_other_wrote(opened, num_bytes, written, offset):
    files = opened(num_bytes, direct=written)
    payloads = {slot: payload_of(digest_of(slot), num_bytes) for slot in range(4)}
    for slot, payload in payloads.items():
        buffer = aligned(num_bytes, offset)
        buffer[:] = payload
        assert files.write(slot, digest_of(slot), FAMILY, buffer) is Outcome.OK
    files.close()
    files.folder.release()
    again = opened(num_bytes, direct=not written)
    for slot, payload in payloads.items():
        into = aligned(num_bytes, offset)
        assert again.read(slot, digest_of(slot), into) is Outcome.OK
        assert into == payload
        assert again.read(slot, digest_of(9), into) is Outcome.OTHER


def test_an_erased_slot_is_empty_and_its_neighbours_are_not(opened):
    files = opened(PAGE)
    for slot in range(3):
        files.write(slot, digest_of(slot), FAMILY, aligned(PAGE))
    assert files.erase(1) is Outcome.OK
    assert files.header(1) is Outcome.EMPTY
    assert files.read(1, digest_of(1), aligned(PAGE)) is Outcome.EMPTY
    assert isinstance(files.header(0), Header)
    assert files.read(2, digest_of(2), aligned(PAGE)) is Outcome.OK


def test_a_probe_changes_no_record(opened):
    files = opened(PAGE)
    files.write(0, digest_of(0), FAMILY, aligned(PAGE))
    files.probe()
    assert files.read(0, digest_of(0), aligned(PAGE)) is Outcome.OK


@pytest.mark.parametrize("num_bytes", [0, 1, 2 * PAGE, 3 * PAGE + 5])
def test_a_file_that_was_cut_off_loses_only_what_it_lost(opened, tmp_path, num_bytes):
    files = opened(PAGE)
    for slot in range(4):
        files.write(slot, digest_of(slot), FAMILY, memoryview(payload_of(digest_of(slot), PAGE)))
    size = (tmp_path / "segment-00000").stat().st_size
    with (tmp_path / "segment-00000").open("r+b") as file:
        file.truncate(num_bytes)
    assert files.read(3, digest_of(3), aligned(PAGE)) is Outcome.CORRUPT
    files.close()
    files.folder.release()
    again = opened(PAGE)
    assert (tmp_path / "segment-00000").stat().st_size == size
    outcomes = [again.read(slot, digest_of(slot), aligned(PAGE)) for slot in range(4)]
    whole = max(0, num_bytes - PAGE) // (2 * PAGE)
    assert outcomes[:whole] == [Outcome.OK] * whole
    assert Outcome.OK not in outcomes[whole:]


def test_a_longer_file_is_cut_to_its_size(opened, tmp_path):
    files = opened(PAGE, slots=8)
    files.write(0, digest_of(0), FAMILY, aligned(PAGE))
    files.close()
    files.folder.release()
    again = opened(PAGE, slots=2)
    assert (tmp_path / "segment-00000").stat().st_size == again.sizes.file_bytes(0) == PAGE + 4 * PAGE
    assert again.read(0, digest_of(0), aligned(PAGE)) is Outcome.OK


def test_the_disk_space_of_a_new_file_is_allocated(opened, tmp_path):
    files = opened(PAGE, slots=50)
    assert (tmp_path / "segment-00000").stat().st_blocks * 512 >= files.sizes.file_bytes(0)


@given(st.integers(2, 100), st.integers(1, 10_000), st.integers(1, 1000))
def test_the_sizes_of_all_files_stay_within_the_cap(stride, max_pages, segment_pages):
    stride, max_bytes = stride * PAGE, max_pages * PAGE
    if max_bytes < PAGE + stride:
        return
    sizes = Sizes(stride, max_bytes, segment_pages * PAGE)
    slots = [slot for segment in range(sizes.num_segments) for slot in sizes.slots(segment)]
    assert slots == list(range(sizes.num_slots))
    assert slots
    total = sum(sizes.file_bytes(segment) for segment in range(sizes.num_segments))
    assert total <= max_bytes < total + PAGE + stride
    assert sizes.num_segments <= MAX_SEGMENTS
    for slot in slots[:: max(1, len(slots) // 7)]:
        segment, offset = sizes.where(slot)
        assert slot in sizes.slots(segment)
        assert offset + stride <= sizes.file_bytes(segment)


def test_a_stride_that_does_not_divide_the_file_makes_no_file_too_many():
    sizes = Sizes(3 << 20, 128 << 30, 1 << 30)
    assert sizes.num_segments <= MAX_SEGMENTS


@pytest.mark.parametrize("num_bytes", [100, PAGE + 100])
def test_the_padding_of_a_record_holds_no_bytes_of_another(opened, tmp_path, num_bytes):
    files = opened(num_bytes)
    files._scratch.header[:] = files._scratch.tail[:] = b"x" * PAGE  # as another record leaves them
    assert files.write(0, digest_of(0), FAMILY, memoryview(bytes(num_bytes))) is Outcome.OK
    slot = (tmp_path / "segment-00000").read_bytes()[PAGE : PAGE + files.sizes.stride]
    assert not any(slot[HEADER_BYTES:])
