"""Tests that the token lists of the workloads never change, since other engines were measured on the same lists."""

import json

import pytest
import xxhash

from engine.errors import ConfigError
from server import bench

# Workload -> (requests, output tokens, hash) of the token lists that other engines were measured on.
DIGESTS = {
    "mixed256": (256, 133966, "fe3d947c79f3af74"),
    "mixed1024": (1024, 583802, "01e3181abfa454d6"),
    "single": (1, 256, "9832718f38d19c73"),
    "decode64": (64, 16384, "0cf3351bd79019c5"),
    "prefill": (32, 32, "17a10d23b5972551"),
    "long32k": (16, 4096, "3fd952d3ac78332e"),
    "long120k": (1, 128, "fc8e19b3744baaa5"),
}


def digest(work):
    data = json.dumps([[w.prompt, w.num_outputs] for w in work]).encode()
    return len(work), sum(w.num_outputs for w in work), xxhash.xxh3_64_hexdigest(data)


@pytest.mark.parametrize("name", sorted(bench.WORKLOADS))
def test_workloads_do_not_change(name):
    assert digest(bench.build_workload(name)) == DIGESTS[name]


def test_an_unknown_workload_is_an_error():
    with pytest.raises(ConfigError, match="single, decode64"):
        bench.build_workload("double")


@pytest.mark.parametrize("vocab_size", [10_001, 32_000, 151_936])
def test_vocabularies_above_10000_give_the_same_lists(vocab_size):
    assert digest(bench.build_workload("decode64", vocab_size)) == DIGESTS["decode64"]


@pytest.mark.parametrize("vocab_size", [1, 512, 10_000])
def test_a_smaller_vocabulary_gives_ids_within_it(vocab_size):
    ids = {id for work in bench.build_workload("decode64", vocab_size) for id in work.prompt}
    assert min(ids) >= 0
    assert max(ids) < vocab_size


@pytest.mark.parametrize(("num", "rows"), [(1, 256), (64, 256), (256, 256), (1024, 256), (64, 16)])
def test_the_warm_up_has_a_batch_for_every_graph_size(num, rows):
    work = bench.fixed(num, 16, 256)
    (longest,), at_once = bench.warm_up_of(work, rows)
    assert longest.prompt == work[0].prompt
    most = min(num, rows)
    assert len(at_once) == most
    left = [sum(w.num_outputs > step for w in at_once) for step in range(max(w.num_outputs for w in at_once))]
    sizes = [size for size in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256) if size < most] + [most]
    met = {min(size for size in sizes if size >= now) for now in left}
    assert met == set(sizes)
