"""Tests the integer helpers of kernel launches against Triton's, and the number of parts into which a decode cuts sequences."""

from __future__ import annotations

import triton

from engine.kernels.launch import cdiv, power_of_two
from engine.kernels.paged_decode import choose_splits


def test_integer_helpers_equal_those_of_triton():
    for number in range(1, 5000):
        assert power_of_two(number) == triton.next_power_of_2(number)
        assert [cdiv(number, by) for by in (1, 7, 64)] == [triton.cdiv(number, by) for by in (1, 7, 64)]


def test_a_sequence_has_more_parts_the_fewer_programs_a_step_has():
    assert [choose_splits(num, 8, 132) for num in (1, 8, 16, 33, 34, 66, 67, 256)] == [32, 4, 4, 4, 2, 2, 1, 1]
    assert choose_splits(1, 1, 132) == 32
