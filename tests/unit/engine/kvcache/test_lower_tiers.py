"""Tests of LowerTiers over a real disk store: what is found where, what a disk that fails leaves, and what is withdrawn."""

import pytest

from engine.kvcache.disk_tier import DiskRecord
from engine.kvcache.gate import Decision
from engine.kvcache.host_tier import Slot
from engine.kvcache.kinds import HitRule
from engine.kvcache.link import TELLING
from engine.kvcache.lower_tiers import LowerTiers
from engine.kvcache.pool import BlockPool
from engine.kvcache.prefix import PrefixIndex
from engine.plan import PER_TOKEN, Tier

A = list(range(100, 117))  # four full blocks and one token
LONG = list(range(300, 300 + 4 * TELLING + 1))
NO_TOKENS = dict.fromkeys(Tier, 0)


def disk_turns_off(rig, folder):
    """Move the folder away, and let the store notice. Returns the requests whose loads have thereby ended."""
    (folder / "kv").rename(folder / "elsewhere")

    def is_off():
        rig.clock.now += 10.0
        return not rig.disk.is_on

    return rig.tend(is_off)


def withdraw(rig, tokens):
    """Withdraw the family of a prompt, as if a request that computed it had failed."""
    bad = rig.request(tokens)
    rig.manager.withdraw(bad)
    rig.end(bad)


def test_without_slots_in_the_host_there_is_no_tier_and_nothing_is_found():
    tiers = LowerTiers(BlockPool(4), PrefixIndex(), HitRule(PER_TOKEN, 4), 4)
    assert not tiers
    assert not tiers.has_work
    assert tiers.find(b"x" * 16) is None
    assert tiers.tend() == []
    assert tiers.stats(4096, NO_TOKENS) == {}


def test_a_block_is_taken_from_the_fastest_tier_that_has_it(rig_in):
    rig = rig_in()
    digests = rig.saved(A)
    assert isinstance(rig.tiers.find(digests[0]), DiskRecord)
    rig.manager.load(rig.request(A[:9]))
    assert rig.tiers.find(digests[0]) is None  # it is on its way
    rig.settle()
    assert [type(rig.tiers.find(digest)) for digest in digests] == [Slot, Slot, DiskRecord, DiskRecord]


def test_the_part_of_a_prefix_that_a_slow_disk_has_is_computed(rig_in):
    rig = rig_in(blocks=12, slots=12, compute=lambda first, end: end - first)  # a second for each token
    rig.saved(LONG)
    first = rig.request(LONG[:9])
    assert rig.manager.load(first)
    rig.settle()
    rig.end(first)
    rig.fill()
    rig.arrive()
    link = rig.tiers.loads.disk_link
    link.begin(TELLING, rig.clock.now)
    rig.clock.now += 1000.0
    link.end(TELLING, rig.clock.now)
    request = rig.request(LONG)
    assert rig.manager.load(request)
    assert rig.manager.num_held(request) == 2
    assert rig.tiers.decisions == {Decision.LOAD: 1, Decision.PART: 1}
    assert rig.settle() == [request]
    rig.compute(request)
    assert rig.tiers.decisions == {Decision.LOAD: 1, Decision.PART: 1, Decision.COMPUTE: 1}


@pytest.mark.parametrize("num_read", [0, 2])
def test_a_request_goes_on_with_what_has_come_when_the_disk_turns_off(rig_in, tmp_path, num_read):
    rig = rig_in(num_threads=2)
    rig.saved(A)
    gate = rig.gate("read")
    request = rig.request(A)
    assert rig.manager.load(request)
    gate.open(num_read)
    rig.tend(lambda: rig.manager.num_moving == num_read)
    rig.arrive()
    assert disk_turns_off(rig, tmp_path) == [request]
    assert rig.manager.num_held(request) == num_read
    assert not rig.disk.is_idle
    assert not rig.tiers.has_work  # a read that may never end keeps nobody busy
    rig.compute(request)
    assert request.num_computed == 17
    gate.open()
    rig.tend(lambda: rig.disk.is_idle)


def test_blocks_that_are_being_moved_when_the_disk_turns_off_are_waited_for(rig_in, tmp_path):
    rig = rig_in(num_threads=1)
    rig.saved(A)
    gate = rig.gate("read")
    request = rig.request(A)
    assert rig.manager.load(request)
    gate.open(1)
    rig.tend(lambda: rig.manager.num_moving == 1)
    assert disk_turns_off(rig, tmp_path) == []
    assert rig.manager.is_loading(request)
    assert rig.arrive() == [request]
    assert rig.manager.num_held(request) == 1
    gate.open()
    rig.tend(lambda: rig.disk.is_idle)


@pytest.mark.parametrize("when", ["queued", "reading", "read", "moving", "loaded"])
@pytest.mark.parametrize("is_aborted", [False, True])
def test_nothing_of_a_withdrawn_family_is_used_wherever_it_is(rig_in, when, is_aborted):
    rig = rig_in(slots=1 if when == "queued" else 8, num_threads=1)
    digests = rig.saved(A)
    gate = rig.gate("read")
    request = rig.request(A)
    assert rig.manager.load(request)
    if when not in ("queued", "reading"):
        gate.open()
        if when == "read":
            rig.disk.store._workers.close(30.0)  # all reads have ended, and nobody has looked
        else:
            rig.tend(lambda: rig.manager.num_moving == 4)
    if when == "loaded":
        assert rig.arrive() == [request]
    if is_aborted:
        rig.end(request)
    withdraw(rig, A)
    gate.open()
    ended = rig.settle()
    assert ended == ([] if is_aborted or when == "loaded" else [request])
    assert (rig.manager.num_held(request), rig.manager.num_cached, len(rig.tiers.host)) == (0, 0, 0)
    assert rig.manager.num_free == rig.manager.num_blocks
    assert rig.on_disk(digests) == []
    assert not rig.manager.load(rig.request(A))


def test_a_request_that_ends_while_its_blocks_are_read_leaves_them_in_the_host(rig_in):
    rig = rig_in(num_threads=1, slots=3)
    digests = rig.saved(A)
    gate = rig.gate("read")
    request = rig.request(A)
    assert rig.manager.load(request)
    rig.end(request)
    assert rig.manager.num_free == rig.manager.num_blocks
    assert rig.manager.num_loading == 0
    assert rig.tiers.has_work  # the reads end, and their slots are in use until then
    gate.open()
    assert rig.settle() == []
    assert [rig.tiers.host.find(digest) is not None for digest in digests] == [True, True, True, False]
    again = rig.request(A)
    assert rig.manager.load(again)
    assert rig.settle() == [again]
    assert rig.manager.num_held(again) == 4


def test_a_second_request_waits_for_the_reads_of_the_first_and_goes_on_when_that_ends(rig_in):
    rig = rig_in(blocks=12)
    rig.saved(A)
    gate = rig.gate("read")
    first, second = rig.request(A), rig.request(A)
    assert rig.manager.load(first)
    assert rig.manager.awaits_load(second)
    assert not rig.manager.load(second)
    rig.end(first)
    assert not rig.manager.awaits_load(second)
    assert not rig.manager.load(second)  # its blocks are still being read, for nobody
    gate.open()
    rig.settle()
    assert rig.manager.load(second)
    assert rig.settle() == [second]


def test_the_figures_of_both_tiers(rig_in):
    rig = rig_in()
    rig.saved(A)
    rig.manager.load(rig.request(A))
    rig.settle()
    stats = rig.tiers.stats(4096, {Tier.HOST: 3, Tier.DISK: 5})
    assert set(stats) == {"host", "disk"}
    assert (stats["host"].blocks_limit, stats["host"].cached_tokens, stats["host"].promoted_bytes) == (8, 3, 4 * 4096)
    assert (stats["disk"].blocks_limit, stats["disk"].cached_tokens, stats["disk"].promoted_bytes) == (16, 5, 4 * 4096)
    assert (stats["disk"].num_on, stats["disk"].num_unsaved) == (1, 0)
