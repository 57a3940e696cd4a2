"""Defines the rig of tiers that the tests of loads, saves and lower tiers share."""

import pytest

from tests.support.tier_rig import TierRig


@pytest.fixture
def rig_in(tmp_path):
    """Return a function that makes a TierRig in `tmp_path`. It is checked and closed after the test."""
    rigs = []

    def make(**options) -> TierRig:
        rigs.append(TierRig(tmp_path / "kv", **options))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.check()
        rig.close()
