"""Tests of Saves with a real disk store: which blocks are written, in which order, and what happens to those that cannot be."""

import pytest

from engine.kvcache import saves
from engine.plan import PER_TOKEN, PoolKind, Tier

A = list(range(100, 117))  # four full blocks and one token
B = list(range(200, 217))
STATE = (*PER_TOKEN, PoolKind("state"))


def test_blocks_of_a_request_that_finished_are_written_once(rig_in):
    rig = rig_in()
    digests = rig.finish(A)
    rig.settle()
    assert rig.on_disk(digests) == [0, 1, 2, 3]
    rig.finish(A)
    rig.settle()
    stats = rig.disk.stats()
    assert (stats.num_demoted, stats.demoted_bytes, rig.tiers.saves.num_dropped) == (4, 4 * 4096, 0)


def test_blocks_that_were_used_once_are_written_only_when_they_are_used_again(rig_in):
    rig = rig_in(blocks=16)
    first = rig.compute(A)
    digests = list(rig.manager._chains[first].digests)
    rig.end(first)
    rig.settle()
    assert not rig.tiers.has_saves
    rig.end(rig.compute(A[:9]))
    rig.settle()
    assert rig.on_disk(digests) == [0, 1]


def test_what_was_written_is_found_after_a_restart(rig_in):
    rig = rig_in()
    digests = rig.saved(A)
    rig.close()
    rig = rig_in()
    assert rig.on_disk(digests) == [0, 1, 2, 3]
    request = rig.request(A)
    assert rig.manager.load(request)
    assert rig.settle() == [request]
    assert rig.manager.num_held(request) == 4


def test_a_block_that_is_nowhere_any_more_when_its_turn_comes_is_not_saved(rig_in):
    rig = rig_in(slots=2)
    rig.finish(A)
    rig.fill()
    rig.arrive()  # two blocks went to the host, and two are lost
    rig.settle()
    assert (rig.disk.stats().num_demoted, rig.tiers.saves.num_dropped) == (2, 2)


def test_a_block_whose_copy_was_overwritten_in_the_host_is_copied_again(rig_in):
    rig = rig_in(slots=1)
    gate = rig.gate("write")
    digests = rig.finish(A[:5])
    rig.tend()
    rig.arrive()
    slot = rig.tiers.host.find(digests[0])
    other = rig.tiers.host.take(b"x" * 16, b"x" * 16, -1)
    assert other.number == slot.number
    rig.tiers.host.arrived(other.number, ok=False)
    gate.open()
    rig.settle()
    assert rig.on_disk(digests) == [0]
    assert rig.tiers.moves.num_demoted == 2


def test_a_copy_that_fails_is_not_tried_again(rig_in):
    rig = rig_in()
    digests = rig.finish(A)
    rig.tend()
    copies = rig.manager.tiers.moves.waiting
    bad = copies[2]
    rig.arrive(ok=lambda copy: copy != bad)
    rig.settle()
    assert rig.on_disk(digests) == [0, 1, 3]
    assert rig.tiers.saves.num_dropped == 1


def test_the_end_of_a_prefix_is_not_saved_if_too_many_blocks_are_wanted(rig_in, monkeypatch):
    monkeypatch.setattr(saves, "MAX_WANTED", 6)
    rig = rig_in(blocks=16)
    first, second = rig.finish(A), rig.finish(B)
    rig.settle()
    assert (rig.on_disk(first), rig.on_disk(second)) == ([0, 1, 2, 3], [0, 1])
    assert rig.tiers.saves.num_dropped == 2


def test_blocks_are_written_from_the_beginning_of_the_prefix_and_evicted_from_its_end(rig_in):
    rig = rig_in(blocks=16, records=4)
    digests = rig.finish(A)
    rig.settle()
    assert [rig.disk.find(digest).slot for digest in digests] == [0, 1, 2, 3]  # slots are taken in their order
    rig.finish(A)
    rig.finish(B[:5])
    rig.settle()
    assert rig.on_disk(digests) == [0, 1, 2]


def test_a_block_is_saved_with_all_records_that_it_has_on_the_device(rig_in):
    """The host has it without the state after its last token, which a later request kept."""
    rig = rig_in(kinds=STATE, blocks=16, slots=16)
    first = rig.compute(A, end=17)
    digests = list(rig.manager._chains[first].digests)
    rig.end(first)
    rig.fill()
    rig.arrive()
    inner = rig.tiers.host.find(digests[1]).mask
    rig.finish(rig.request(A[:8]))
    rig.settle()
    assert rig.disk.find(digests[1]).mask == -1 != inner
    assert rig.disk.find(digests[0]).mask == inner


def test_the_cap_on_writes_is_kept_and_the_rest_is_written_later(rig_in):
    rig = rig_in(write_rate=8192.0, write_burst=2 * 8192.0)
    digests = rig.finish(A)
    rig.tend()
    rig.arrive()
    rig.tend(lambda: rig.disk.num_written == 2)
    assert rig.tend() == []
    assert rig.on_disk(digests) == [0, 1]
    assert len(rig.tiers.saves) == 2
    rig.clock.now += 1.0
    rig.tend(lambda: rig.disk.num_written == 3)
    rig.clock.now += 1.0
    rig.settle()
    assert rig.on_disk(digests) == [0, 1, 2, 3]


def test_writes_wait_while_the_disk_is_busy(rig_in):
    rig = rig_in(max_writes=1)
    gate = rig.gate("write")
    digests = rig.finish(A)
    rig.tend()
    rig.arrive()
    rig.tend()
    assert rig.disk.store.num_writing == 1
    gate.open()
    rig.settle()
    assert rig.on_disk(digests) == [0, 1, 2, 3]


def test_writes_wait_for_a_slot_while_all_are_read(rig_in):
    rig = rig_in(records=4, slots=12, blocks=12)
    rig.saved(A)
    gate = rig.gate("read")
    request = rig.request(A)
    assert rig.manager.load(request)
    digests = rig.finish(B[:9])
    rig.tend()
    rig.arrive()
    rig.tend()
    assert (rig.on_disk(digests), len(rig.tiers.saves)) == ([], 2)
    gate.open()
    assert rig.settle() == [request]
    assert rig.on_disk(digests) == [0, 1]


@pytest.mark.parametrize("when", ["wanted", "arriving", "ready", "writing"])
def test_a_family_that_is_withdrawn_is_not_saved(rig_in, when):
    rig = rig_in(max_writes=1)
    gate = rig.gate("write")
    digests = rig.finish(A)
    if when != "wanted":
        rig.tend()
    if when in ("ready", "writing"):
        rig.arrive()
    if when == "writing":
        rig.tend()
        assert rig.disk.store.num_writing == 1
    bad = rig.compute(A[:5])
    rig.manager.withdraw(bad)
    rig.end(bad)
    assert len(rig.tiers.saves) == (when == "writing")
    gate.open()
    rig.settle()
    assert rig.on_disk(digests) == []
    assert (len(rig.tiers.host), rig.manager.num_cached) == (0, 0)
    rig.finish(A)  # computed again, it is right
    rig.settle()
    assert rig.on_disk(digests) == [0, 1, 2, 3]
    rig.close()
    assert rig_in().on_disk(digests) == [0, 1, 2, 3]


def test_a_block_that_is_being_written_when_the_disk_is_cleared_is_written_again_later(rig_in):
    rig = rig_in()
    gate = rig.gate("write")
    digests = rig.finish(A)
    rig.tend()
    rig.arrive()
    rig.tend()
    rig.tiers.clear(Tier.DISK)
    rig.finish(A)
    rig.tend()
    assert rig.disk.store.num_writing == 4
    gate.open()
    rig.settle()
    assert rig.on_disk(digests) == [0, 1, 2, 3]


def test_nothing_is_copied_for_a_disk_that_is_off_and_it_is_saved_when_it_is_on_again(rig_in, tmp_path):
    rig = rig_in()
    (tmp_path / "kv").rename(tmp_path / "elsewhere")
    rig.clock.now += 10.0
    rig.tend(lambda: not rig.disk.is_on)
    digests = rig.finish(A)
    rig.tend()
    assert not rig.manager.has_copies
    assert not rig.tiers.has_saves
    (tmp_path / "elsewhere").rename(tmp_path / "kv")
    rig.clock.now += 10.0
    rig.tend(lambda: rig.disk.is_on)
    rig.settle()
    assert rig.on_disk(digests) == [0, 1, 2, 3]
