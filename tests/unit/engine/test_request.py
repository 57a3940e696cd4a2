"""Tests of the split of a prompt's cached tokens by tier."""

import pytest

from engine.request import CachedTokens


@pytest.mark.parametrize(
    ("num", "computed", "host", "disk", "split"),
    [
        (0, 0, 0, 0, CachedTokens()),
        (40, 40, 0, 0, CachedTokens(gpu=40)),
        (40, 40, 12, 20, CachedTokens(gpu=8, host=12, disk=20)),
        (30, 40, 12, 20, CachedTokens(gpu=8, host=12, disk=10)),
        (15, 40, 12, 20, CachedTokens(gpu=8, host=7)),
        (5, 40, 12, 20, CachedTokens(gpu=5)),
    ],
)
def test_the_tiers_of_the_cached_part_of_a_prompt_add_up_to_it(num, computed, host, disk, split):
    assert CachedTokens.split(num, computed, host, disk) == split
    assert split.total == num


def test_cached_tokens_of_several_prompts_are_added_by_tier():
    prompts = [CachedTokens(1, 2, 3), CachedTokens(10, 20, 30)]
    assert sum(prompts, CachedTokens()) == CachedTokens(11, 22, 33)
