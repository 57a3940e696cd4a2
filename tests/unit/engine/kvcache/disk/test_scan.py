"""Tests the scan: it finds records in small steps, and goes on where a fault stopped it."""

import errno

import pytest

from engine.kvcache.disk.folder import Folder
from engine.kvcache.disk.outcome import Outcome
from engine.kvcache.disk.record_files import RecordFiles, Sizes
from engine.kvcache.disk.records import PAGE, RecordFormat
from engine.kvcache.disk.scan import HEADERS_A_STEP, Batch, Scan, ScanEnded, Stamps
from engine.kvcache.disk.segments import SegmentFile
from tests.support.disk_store import digest_of, family_of

NUM_SLOTS = 2 * HEADERS_A_STEP + 10  # of a segment file


@pytest.fixture
def files(tmp_path):
    """Yield the files of a new folder, with room for two segment files, none of which is open."""
    folder = Folder(tmp_path / "kv")
    folder.claim()
    form = RecordFormat(10, b"", folder.key)
    size = PAGE + NUM_SLOTS * form.stride
    files = RecordFiles(folder, form, Sizes(form.stride, 2 * size, size), direct=True, stamp=Stamps(lambda: 1).next)
    yield files
    files.close()
    folder.release()


def write(files, slots):
    for slot in slots:
        assert files.write(slot, digest_of(slot), family_of(slot), memoryview(bytes(10))) is Outcome.OK


def run(files, stamps=None, first=0):
    """Return the scan and what it told."""
    told = []
    scan = Scan(files, stamps or Stamps(), told.append, first)
    while scan.step():
        pass
    return scan, told


def test_the_slots_of_a_new_file_are_free_at_once(files):
    _, told = run(files)
    assert told == [Batch(free=range(NUM_SLOTS)), Batch(free=range(NUM_SLOTS, 2 * NUM_SLOTS)), ScanEnded(Outcome.OK)]


def test_records_are_found_a_few_at_a_time(files):
    run(files)
    write(files, range(0, NUM_SLOTS, 2))
    files.erase(4)
    files.close()
    stamps = Stamps(lambda: 0)
    _, told = run(files, stamps)
    batches = [news for news in told if isinstance(news, Batch)]
    assert [len(batch.found) + len(batch.free) for batch in batches[:3]] == [HEADERS_A_STEP, HEADERS_A_STEP, 10]
    found = {slot: names for batch in batches for slot, *names, _ in batch.found}
    assert found == {slot: [digest_of(slot), family_of(slot)] for slot in range(0, NUM_SLOTS, 2) if slot != 4}
    assert sorted([*found, *(slot for batch in batches for slot in batch.free)]) == list(range(2 * NUM_SLOTS))
    assert stamps.next() > max(stamp for batch in batches for *_, stamp in batch.found)


def test_a_file_that_cannot_be_opened_ends_the_scan_and_the_next_one_begins_there(files):
    obstacle = files.folder.path / "segment-00001"
    obstacle.mkdir()
    scan, told = run(files)
    assert told == [Batch(free=range(NUM_SLOTS)), ScanEnded(Outcome.IO_ERROR)]
    assert scan.next_segment == 1
    obstacle.rmdir()
    _, told = run(files, first=scan.next_segment)
    assert told == [Batch(free=range(NUM_SLOTS, 2 * NUM_SLOTS)), ScanEnded(Outcome.OK)]


def faulty(files, monkeypatch, slots, number):
    """Make reading the headers of `slots`, which are of the first file, fail with error `number`."""
    read = SegmentFile.read

    def read_or_fail(segment, pages, offset, *, aligned):
        if offset in {files.sizes.where(slot)[1] for slot in slots}:
            raise OSError(number, "as the test wants it")
        return read(segment, pages, offset, aligned=aligned)

    monkeypatch.setattr(SegmentFile, "read", read_or_fail)


@pytest.fixture
def written(files):
    """Return the files with a record in each slot of the first one, and none open."""
    run(files)
    write(files, range(NUM_SLOTS))
    files.close()
    return files


def test_a_bad_spot_costs_its_slot_alone(written, monkeypatch):
    faulty(written, monkeypatch, {3}, errno.EIO)
    _, told = run(written)
    assert told[0].unreadable == [3]
    assert told[0].dropped == {Outcome.IO_ERROR: 1}
    assert len(told[0].found) == HEADERS_A_STEP - 1
    assert told[-1] == ScanEnded(Outcome.OK)


@pytest.mark.parametrize(
    ("slots", "number", "outcome"),
    [({HEADERS_A_STEP + 3}, errno.ESTALE, Outcome.GONE), (set(range(HEADERS_A_STEP, NUM_SLOTS)), errno.EIO, Outcome.IO_ERROR)],
)
def test_a_fault_of_the_disk_ends_the_scan_and_retires_no_slot(written, monkeypatch, slots, number, outcome):
    faulty(written, monkeypatch, slots, number)
    scan, told = run(written)
    assert [len(batch.found) for batch in told[:-1]] == [HEADERS_A_STEP]
    assert told[-1] == ScanEnded(outcome)
    assert scan.next_segment == 0
    monkeypatch.undo()
    _, told = run(written, first=scan.next_segment)
    assert sum(len(news.found) for news in told if isinstance(news, Batch)) == NUM_SLOTS


def test_a_scan_that_was_stopped_tells_nothing_more(files):
    told = []
    scan = Scan(files, Stamps(), told.append)
    assert scan.step()
    scan.stop()
    assert not scan.step()
    assert len(told) == 1


def test_stamps_rise_though_the_clock_goes_back():
    times = iter([10, 20, 5, 30])
    stamps = Stamps(lambda: next(times))
    assert [stamps.next() for _ in range(2)] == [10, 20]
    stamps.saw(24)
    assert [stamps.next() for _ in range(2)] == [25, 30]
