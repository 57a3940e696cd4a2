"""MoveList: the copies that the next plan must carry, and how many moves between the device and the host are under way."""

from __future__ import annotations

from collections.abc import Iterable

from engine.plan import Arrival, BlockCopy, Place, Tier


class MoveList:
    __slots__ = ("_copies", "num_demoted", "num_failed", "num_promoted", "num_under_way")

    def __init__(self) -> None:
        self._copies: list[BlockCopy] = []
        self.num_under_way = 0  # moves that a plan carries or will carry, and that have not arrived
        self.num_demoted = self.num_promoted = self.num_failed = 0  # moves to and from the host that have ended

    def __len__(self) -> int:
        """Return how many copies wait for a plan."""
        return len(self._copies)

    @property
    def waiting(self) -> list[BlockCopy]:
        """The copies that wait for a plan, in order, to look at."""
        return self._copies

    def copy(self, src: Place, dst: Place) -> None:
        """Add a copy within the device."""
        self._copies.append(BlockCopy(src, dst))

    def move(self, src: Place, dst: Place) -> None:
        """Add a move between the device and the host."""
        self._copies.append(BlockCopy(src, dst))
        self.num_under_way += 1

    def take(self) -> list[BlockCopy]:
        """Return the copies that the next plan must carry, in order, and forget them."""
        copies, self._copies = self._copies, []
        return copies

    def count(self, arrivals: Iterable[Arrival]) -> None:
        """Count moves that have ended."""
        for (tier, _), ok in arrivals:
            self.num_under_way -= 1
            self.num_failed += not ok
            self.num_demoted += ok and tier is Tier.HOST
            self.num_promoted += ok and tier is Tier.GPU
