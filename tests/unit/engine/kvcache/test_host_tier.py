"""Tests of HostTier: the order of eviction, pins, arrivals, withdrawals, and the errors that `check` finds."""

import random

import pytest

from engine.errors import InternalError
from engine.kvcache.host_tier import HostTier
from engine.kvcache.kinds import ALL


def filled(tier: HostTier, *names: str) -> None:
    """Put content into the tier, and let it arrive."""
    for name in names:
        slot = tier.take(name.encode(), name[:1].encode(), ALL)
        assert slot is not None
        tier.arrived(slot.number, ok=True)


def there(tier: HostTier, *names: str) -> str:
    return "".join(name for name in names if tier.find(name.encode()) is not None)


def test_the_least_recently_used_content_makes_room():
    tier = HostTier(3)
    filled(tier, "a", "b", "c")
    assert tier.touch(b"a", ALL)
    filled(tier, "d")
    assert there(tier, *"abcd") == "acd"
    slot = tier.find(b"c")
    tier.pin(slot)
    tier.unpin(slot)
    filled(tier, "e")
    assert there(tier, *"acde") == "cde"
    assert (len(tier), tier.num_evicted) == (3, 2)
    tier.check()


def test_content_is_found_once_it_has_arrived_and_known_before():
    tier = HostTier(2)
    slot = tier.take(b"a", b"f", ALL)
    assert tier.find(b"a") is None
    assert tier.touch(b"a", ALL)
    tier.check()
    tier.arrived(slot.number, ok=True)
    assert tier.find(b"a") is slot
    assert not tier.touch(b"b", ALL)


def test_pinned_slots_are_not_taken_and_none_is_taken_if_all_are():
    tier = HostTier(2)
    filled(tier, "a", "b")
    tier.pin(tier.find(b"a"))
    filled(tier, "c")
    assert there(tier, *"abc") == "ac"
    tier.pin(tier.find(b"c"))
    assert tier.take(b"d", b"f", ALL) is None
    tier.check()


def test_content_whose_move_failed_is_forgotten():
    tier = HostTier(1)
    slot = tier.take(b"a", b"f", ALL)
    tier.arrived(slot.number, ok=False)
    tier.check()
    assert len(tier) == 0
    filled(tier, "b")
    assert there(tier, "b") == "b"


@pytest.mark.parametrize("moving", [False, True])
def test_a_withdrawn_family_is_gone_at_once_and_its_slots_once_their_moves_have_ended(moving):
    tier = HostTier(3)
    filled(tier, "x1", "x2", "y1")
    slot = tier.find(b"x1")
    if moving:
        tier.pin(slot)
    tier.withdraw(b"x")
    assert there(tier, "x1", "x2", "y1") == "y1"
    tier.check()
    filled(tier, "z1")
    if moving:
        assert tier.take(b"z2", b"z", ALL).number != slot.number
        tier.unpin(slot)
        tier.check()
    filled(tier, "z3")
    tier.check()


def test_random_operations_keep_the_cap_and_agree_with_a_list():
    rng, tier, pinned = random.Random(0), HostTier(5), []
    order: list[bytes] = []  # contents that are idle, least recently used first
    for _ in range(4000):
        action, digest = rng.choice("taupdw"), bytes([rng.randrange(12)])
        if action == "t" and not tier.touch(digest, ALL):
            slot = tier.take(digest, bytes([digest[0] % 3]), ALL)
            assert (slot is None) == (len({id(s) for s in pinned}) == 5)
            if slot is not None:
                if len(order) + len({id(s) for s in pinned}) == 5:
                    order.pop(0)
                pinned.append(slot)
        elif action == "t" and digest in order:
            order.remove(digest)
            order.append(digest)
        elif action == "p" and tier.find(digest) is not None:
            pinned.append(tier.find(digest))
            tier.pin(pinned[-1])
            order = [other for other in order if other != digest]
        elif action in "au" and pinned:
            slot = pinned.pop(rng.randrange(len(pinned)))
            if slot.ready:
                tier.unpin(slot)
            else:
                tier.arrived(slot.number, ok=rng.random() < 0.8)
            if slot.listed and slot not in pinned:
                order.append(slot.digest)
        elif action == "w" and rng.random() < 0.1:
            tier.withdraw(bytes([digest[0] % 3]))
            order = [other for other in order if other[0] % 3 != digest[0] % 3]
        assert [slot.digest for slot in tier._idle.values()] == order
        assert len(tier) <= 5
        tier.check()


@pytest.mark.parametrize("name", ["_free", "_idle", "_moving", "_by_digest"])
def test_check_finds_a_lost_slot_and_a_lost_digest(name):
    tier = HostTier(3)
    filled(tier, "a")
    tier.take(b"b", b"f", ALL)
    found = getattr(tier, name)
    found.pop() if name == "_free" else found.popitem()
    with pytest.raises(InternalError, match="the host tier"):
        tier.check()
