"""Tests of LoadGate: how much of a prefix is loaded, for links and a device of different speeds, and how long a request waits."""

import pytest

from engine.kvcache.disk_tier import DiskRecord
from engine.kvcache.gate import MAX_PATIENCE, LoadGate, unknown
from engine.kvcache.host_tier import Slot
from engine.kvcache.kinds import ALL
from engine.kvcache.link import TELLING, Link

BLOCK = 16
NOW = 100.0


def gate(*, host=0.0, disk=0.0, token=1.0, compute=None) -> LoadGate:
    """Return a gate: a block takes `host` and `disk` seconds over the links, and a token takes `token` seconds to compute."""
    links = []
    for seconds in (host, disk):
        links.append(Link())
        if seconds:
            links[-1].begin(TELLING, NOW - TELLING * seconds)
            links[-1].end(TELLING, NOW)
    return LoadGate(*links, BLOCK, compute or (lambda first, end: (end - first) * token))


def sources(tiers: str) -> list[Slot | DiskRecord]:
    """Return a source for each letter: h for host, d for disk."""
    slot, record = Slot(0, b"", b"", ALL), DiskRecord(0, b"", ALL)
    return [slot if tier == "h" else record for tier in tiers]


@pytest.mark.parametrize(
    ("tiers", "speeds", "worth"),
    [
        ("hhdd", {}, 4),
        ("hhdd", {"host": 1.0, "disk": 2.0}, 4),
        ("hhdd", {"host": 1.0, "disk": 100.0}, 2),
        ("dddd", {"disk": 100.0}, 0),
        ("hhhh", {"host": 100.0}, 0),
        ("hhdd", {"host": 100.0, "disk": 100.0}, 0),
        ("ddhh", {"disk": 15.0}, 4),
        ("ddhh", {"disk": 100.0}, 0),
        ("ddhh", {"disk": 31.0}, 4),  # it is worth waiting for two slow blocks if four need not be computed
        ("dhdh", {"disk": 25.0}, 4),
        ("dddd", {"disk": 16.0}, 4),  # as fast as computing: what is loaded leaves the device to others
    ],
)
def test_what_is_loaded_is_what_gives_the_first_token_soonest(tiers, speeds, worth):
    assert gate(**speeds).num_worth(sources(tiers), 3, (3 + len(tiers)) * BLOCK + 5, NOW) == worth


def test_blocks_that_are_under_way_delay_further_ones():
    slow = gate(disk=10.0)
    assert slow.num_worth(sources("dddd"), 0, 70, NOW) == 4
    slow._disk.begin(4, NOW)
    assert slow.num_worth(sources("dddd"), 0, 70, NOW) == 0


def test_the_position_of_what_is_computed_counts():
    """Attention makes later tokens dearer, so the gate asks for the positions themselves."""
    asked = []
    gate(compute=lambda first, end: asked.append((first, end)) or 1.0).num_worth(sources("hd"), 3, 90, NOW)
    assert asked == [(5 * BLOCK, 90), (4 * BLOCK, 90), (3 * BLOCK, 90)]


def test_all_is_loaded_while_it_is_not_known_how_long_computing_takes():
    slow = gate(host=50.0, disk=50.0, compute=unknown)
    assert slow.num_worth(sources("hhdd"), 0, 70, NOW) == 4
    assert slow.patience(sources("hhdd"), 0) == MAX_PATIENCE


def test_a_request_waits_for_as_long_as_computing_would_take_but_not_for_very_long():
    asked = []
    known = gate(compute=lambda first, end: asked.append((first, end)) or 0.25)
    assert known.patience(sources("hdd"), 2) == 0.25
    assert asked == [(2 * BLOCK, 5 * BLOCK)]
    assert gate(token=100.0).patience(sources("d"), 0) == MAX_PATIENCE
