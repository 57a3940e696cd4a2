"""Tests of Loads with a real disk store: what a waiting request holds while its prefix comes, and how a load ends."""

import pytest

from engine.kvcache.gate import Decision

A = list(range(100, 117))  # four full blocks and one token
B = list(range(200, 217))


def test_a_prefix_on_disk_comes_through_the_host(rig_in):
    rig = rig_in()
    digests = rig.saved(A)
    assert rig.on_disk(digests) == [0, 1, 2, 3]
    request = rig.request(A)
    assert rig.manager.load(request)
    assert (rig.manager.num_held(request), rig.manager.num_loading) == (4, 4)
    assert rig.settle() == [request]
    assert rig.manager.holders() == [request]
    rig.compute(request)
    assert (request.num_from_disk, request.num_loaded) == (16, 0)
    assert all(rig.tiers.host.find(digest) is not None for digest in digests)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_blocks_wait_for_slots_of_the_host_and_all_come(rig_in, slots):
    rig = rig_in(slots=slots, blocks=12)
    rig.saved(A)
    rig.saved(B)
    first, second = rig.request(A), rig.request(B)
    assert rig.manager.load(first)
    assert rig.manager.load(second)
    assert sorted(rig.settle(), key=lambda request: request.request_id) == [first, second]
    assert (rig.manager.num_held(first), rig.manager.num_held(second)) == (4, 4)


@pytest.mark.parametrize("bad", range(4))
def test_a_record_that_cannot_be_read_ends_the_prefix_there(rig_in, tmp_path, bad):
    rig = rig_in(direct=False)
    digests = rig.saved(A)
    record = rig.disk.find(digests[bad])
    segment, offset = rig.disk.store.files._place(record.slot)
    with segment.path.open("r+b") as file:
        file.seek(offset + 5000)
        file.write(b"bad")
    request = rig.request(A)
    assert rig.manager.load(request)
    assert rig.settle() == [request]
    assert rig.manager.num_held(request) == bad
    rig.compute(request)
    assert rig.on_disk(digests) == [number for number in range(4) if number != bad]


def test_reads_wait_while_the_queue_of_the_store_is_full(rig_in):
    rig = rig_in(max_reads=1, num_threads=1)
    rig.saved(A)
    gate = rig.gate("read")
    request = rig.request(A)
    assert rig.manager.load(request)
    assert rig.manager.is_loading(request)
    rig.check()
    gate.open()
    assert rig.settle() == [request]
    assert rig.manager.num_held(request) == 4
    assert rig.disk.store.counts.full_queues == 0


@pytest.mark.parametrize("num_read", range(4))
def test_a_request_that_waited_for_too_long_goes_on_with_what_has_come_and_does_not_load_again(rig_in, num_read):
    rig = rig_in(compute=lambda first, end: 1.0, num_threads=1)
    rig.saved(A)
    gate = rig.gate("read")
    request = rig.request(A)
    assert rig.manager.load(request)
    gate.open(num_read)
    rig.tend(lambda: rig.manager.tiers.moves.num_under_way == num_read)
    rig.arrive()
    assert rig.tend() == []
    rig.clock.now += 1.1
    assert rig.tend() == [request]
    assert rig.tiers.decisions == {Decision.LOAD: 1, Decision.GAVE_UP: 1}
    assert rig.manager.num_held(request) == num_read
    gate.open()
    rig.settle()  # the reads that were under way end in the host
    assert not rig.manager.load(request)
    rig.compute(request)
    assert request.num_from_disk == 4 * num_read


def test_a_request_whose_reads_get_no_slot_of_the_host_computes_its_prefix(rig_in):
    """The host has one slot, and a write that hangs keeps it."""
    rig = rig_in(slots=1, compute=lambda first, end: 1.0)
    rig.saved(A)
    gate = rig.gate("write")
    rig.finish(B)
    rig.tend()
    rig.arrive()
    rig.tend()
    assert rig.tiers.host.take(b"x" * 16, b"x" * 16, -1) is None
    request = rig.request(A)
    assert rig.manager.load(request)
    rig.clock.now += 1.1
    assert rig.tend() == [request]
    assert not rig.manager.load(request)
    rig.compute(request)
    assert request.num_computed == 17
    gate.open()
    rig.settle()
