"""Tests how long a family is remembered as forgotten: as long as the disk may hold one of its records, and no longer."""

from engine.kvcache.disk.forgotten import Forgotten

A, B = b"a" * 16, b"b" * 16


def after_the_scan():
    forgotten = Forgotten()
    forgotten.end_scan()
    return forgotten


def test_a_family_is_remembered_until_its_last_slot_is_overwritten():
    forgotten = after_the_scan()
    forgotten.add(A, [1, 2])
    forgotten.overwritten(1)
    assert A in forgotten
    assert B not in forgotten
    assert forgotten.slots == {2}
    forgotten.overwritten(2)
    assert A not in forgotten


def test_everything_is_remembered_until_its_last_slot_is_overwritten():
    forgotten = after_the_scan()
    forgotten.add_all([1])
    assert A in forgotten
    assert B in forgotten
    forgotten.overwritten(1)
    assert A not in forgotten


def test_nothing_is_remembered_if_no_slot_may_hold_it():
    forgotten = after_the_scan()
    forgotten.add(A, [])
    assert A not in forgotten
    forgotten.add_all([])
    assert A not in forgotten


def test_a_scan_that_is_under_way_seeks_what_is_forgotten_until_its_end():
    forgotten = Forgotten()
    assert not forgotten.is_seeking
    forgotten.add(A, [])
    assert forgotten.is_seeking
    assert A in forgotten
    forgotten.end_scan()
    assert not forgotten.is_seeking
    assert A not in forgotten


def test_a_slot_in_which_the_scan_found_a_forgotten_record_is_waited_for():
    forgotten = Forgotten()
    forgotten.add(A, [])
    forgotten.found(3)
    forgotten.end_scan()
    assert A in forgotten
    forgotten.overwritten(3)
    assert A not in forgotten


def test_another_scan_seeks_what_may_be_left_and_the_slots_that_it_skips_are_waited_for():
    forgotten = after_the_scan()
    forgotten.add(A, [1, 2])
    forgotten.begin_scan([2, 3])
    assert forgotten.is_seeking
    assert forgotten.slots == {2, 3}
    forgotten.end_scan()
    assert A in forgotten
    forgotten.overwritten(2)
    forgotten.overwritten(3)
    assert A not in forgotten
    forgotten.begin_scan([4])
    assert forgotten.slots == set()
