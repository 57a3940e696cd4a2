"""Forgotten: the families of records that must not be found again, as long as the disk may still hold such a record."""

from __future__ import annotations

from collections.abc import Iterable


class Forgotten:
    """Forgets a family itself once the scan has ended and each slot that may hold one of its records was overwritten.

    Until then a scan of the files may come upon such a record: the first scan, or a later one after the files were mounted again.
    That scan then gives up all records of the family, also those that were written after it was forgotten.
    """

    def __init__(self) -> None:
        self._families: set[bytes] = set()
        self._has_all = False  # every family
        self._slots: set[int] = set()
        self._is_scanning = True

    def __contains__(self, family: bytes) -> bool:
        return self._has_all or family in self._families

    @property
    def slots(self) -> frozenset[int]:
        """Return the slots that may hold a forgotten record."""
        return frozenset(self._slots)

    @property
    def is_seeking(self) -> bool:
        """Return whether the rest of a scan may find a forgotten record."""
        return self._is_scanning and (self._has_all or bool(self._families))

    def add(self, family: bytes, slots: Iterable[int]) -> None:
        """Note that `family` is forgotten. `slots` are all scanned slots that may hold one of its records on disk."""
        self._families.add(family)
        self._slots.update(slots)
        self._clear_if_done()

    def add_all(self, slots: Iterable[int]) -> None:
        """Note that every family is forgotten. `slots` are all scanned slots that may hold a record on disk."""
        self._has_all = True
        self._slots.update(slots)
        self._clear_if_done()

    def found(self, slot: int) -> None:
        """Note that the scan found a forgotten record in the slot, or may have overlooked one there."""
        self._slots.add(slot)

    def overwritten(self, slot: int) -> None:
        """Note that the slot was erased, or holds a new record."""
        self._slots.discard(slot)
        self._clear_if_done()

    def end_scan(self) -> None:
        self._is_scanning = False
        self._clear_if_done()

    def begin_scan(self, in_transit: Iterable[int]) -> None:
        """Note that a scan of all slots but those in transit begins."""
        self._is_scanning = True
        self._slots = set(in_transit) if self.is_seeking else set()

    def _clear_if_done(self) -> None:
        if not self._slots and not self._is_scanning:
            self._families.clear()
            self._has_all = False
