"""Tests that KVStorage copies blocks in the pools of all layers, with the same result as copying one block after another."""

import random

import pytest
import torch

from engine.batch import PoolSpec, block_bytes
from engine.kvcache.storage import KVStorage
from engine.plan import BlockCopy, gpu

POOLS = [
    [PoolSpec(name="k", shape=(2, 3), dtype=torch.float32), PoolSpec(name="v", shape=(2, 3), dtype=torch.float32)],
    [PoolSpec(name="latent", shape=(5,), dtype=torch.bfloat16), PoolSpec(name="scale", shape=(), dtype=torch.float32)],
]


def upload(arrays):
    return [torch.from_numpy(a) for a in arrays]


def numbered(num_blocks=8, block_size=4):
    """Return a KVStorage in which every value of block b is b."""
    storage = KVStorage(POOLS, num_blocks=num_blocks, block_size=block_size, device=torch.device("cpu"))
    for layer in storage.layers:
        for pool in layer.values():
            pool.copy_(torch.arange(num_blocks + 1).view(-1, *[1] * (pool.dim() - 1)).expand_as(pool))
    return storage


def test_pools_have_the_shapes_and_dtypes_of_their_specs_and_hold_zeros_and_a_scratch_block():
    storage = KVStorage(POOLS, num_blocks=3, block_size=4, device=torch.device("cpu"))
    assert [{n: (tuple(p.shape), p.dtype) for n, p in layer.items()} for layer in storage.layers] == [
        {"k": ((4, 4, 2, 3), torch.float32), "v": ((4, 4, 2, 3), torch.float32)},
        {"latent": ((4, 4, 5), torch.bfloat16), "scale": ((4, 4), torch.float32)},
    ]
    assert not any(p.any() for layer in storage.layers for p in layer.values())
    stored = sum(p.numel() * p.element_size() for layer in storage.layers for p in layer.values())
    assert stored == 4 * block_bytes(POOLS, 4)


@pytest.mark.parametrize("seed", range(10))
def test_copies_have_the_result_of_running_one_after_the_other(seed):
    r = random.Random(seed)
    copies = [BlockCopy(gpu(r.randrange(8)), gpu(r.randrange(8))) for _ in range(r.randint(1, 10))]
    expected = list(range(8))
    for copy in copies:
        expected[copy.dst.number] = expected[copy.src.number]
    storage = numbered()
    storage.copy(copies, upload)
    for layer in storage.layers:
        for pool in layer.values():
            assert (pool[:8] == torch.tensor(expected).view(-1, *[1] * (pool.dim() - 1))).all()


def filled(num_blocks=8, block_size=4):
    """Return a KVStorage with random bytes in all pools."""
    storage = KVStorage(POOLS, num_blocks=num_blocks, block_size=block_size, device=torch.device("cpu"))
    for layer in storage.layers:
        for pool in layer.values():
            pool.view(torch.uint8).random_(0, 255)
    return storage


def block_of(storage, block) -> bytes:
    """Return the bytes of one block in all pools, layer by layer."""
    return b"".join(pool[block].view(torch.uint8).numpy().tobytes() for layer in storage.layers for pool in layer.values())


@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_a_record_has_all_pools_of_a_block_in_one_piece(block_size):
    storage = filled(block_size=block_size)
    assert storage.record_bytes == block_bytes(POOLS, block_size)
    records = torch.empty(3, storage.record_words, dtype=storage.word)
    storage.pack(torch.tensor([5, 0, 7]), records)
    assert [record.numpy().tobytes() for record in records] == [block_of(storage, block) for block in (5, 0, 7)]


@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_records_that_are_unpacked_elsewhere_are_the_blocks_they_were_made_of(block_size):
    storage, other = filled(block_size=block_size), filled(block_size=block_size)
    records = torch.empty(3, storage.record_words, dtype=storage.word)
    storage.pack(torch.tensor([5, 0, 7]), records)
    before = [block_of(other, block) for block in range(8)]
    other.unpack(records, torch.tensor([1, 6, 2]))
    after = [block_of(other, block) for block in range(8)]
    assert [after[block] for block in (1, 6, 2)] == [block_of(storage, block) for block in (5, 0, 7)]
    assert all(after[block] == before[block] for block in (0, 3, 4, 5, 7))


@pytest.mark.parametrize(("size", "word"), [(8, torch.int64), (4, torch.int32), (6, torch.int16), (3, torch.uint8)])
def test_a_word_divides_the_part_of_every_pool(size, word):
    pools = [[PoolSpec(name="a", shape=(size,), dtype=torch.uint8), PoolSpec(name="b", shape=(8,), dtype=torch.uint8)]]
    storage = KVStorage(pools, num_blocks=2, block_size=1, device=torch.device("cpu"))
    assert (storage.word, storage.record_bytes) == (word, size + 8)


def test_an_empty_list_of_copies_changes_nothing():
    storage = numbered()
    storage.copy([], upload)
    assert (storage.layers[1]["scale"][:, 0] == torch.arange(9)).all()
