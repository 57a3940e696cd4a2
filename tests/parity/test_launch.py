"""Sizes of launches: our plain functions beside Triton's, and how many programs a decode's sequences are given."""

from __future__ import annotations

import triton

from engine.kernels.launch import cdiv, power_of_two
from engine.kernels.paged_decode import choose_splits


def test_sizes_are_tritons():
    for number in range(1, 5000):
        assert power_of_two(number) == triton.next_power_of_2(number)
        assert [cdiv(number, by) for by in (1, 7, 64)] == [triton.cdiv(number, by) for by in (1, 7, 64)]


def test_sequences_are_split_while_processors_have_few_programs():
    assert [choose_splits(num, 8, 132) for num in (1, 8, 16, 33, 34, 66, 67, 256)] == [32, 4, 4, 4, 2, 2, 1, 1]
    assert choose_splits(1, 1, 132) == 32
