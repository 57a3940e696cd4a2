"""Tests that BlockCopies moves whole blocks between the device and the host tier, in the order of a plan, on a CPU."""

import random

import pytest
import torch

from engine.batch import PoolSpec, Uploader
from engine.device import moves
from engine.device.moves import BUFFER_BYTES, BlockCopies, buffer_bytes
from engine.errors import ConfigError, InternalError
from engine.kvcache.host_memory import HostMemory
from engine.kvcache.storage import KVStorage
from engine.plan import Arrival, BlockCopy, Tier, gpu, host

CPU = torch.device("cpu")
POOLS = [[PoolSpec(name="k", shape=(2, 3), dtype=torch.float32), PoolSpec(name="v", shape=(5,), dtype=torch.bfloat16)]] * 2
NUM_BLOCKS, NUM_SLOTS = 8, 6


def numbered() -> KVStorage:
    """Return a KVStorage in which every value of block b is b."""
    storage = KVStorage(POOLS, num_blocks=NUM_BLOCKS, block_size=4, device=CPU)
    for layer in storage.layers:
        for pool in layer.values():
            pool.copy_(torch.arange(NUM_BLOCKS + 1).view(-1, *[1] * (pool.dim() - 1)).expand_as(pool))
    return storage


def memory(storage: KVStorage, num_slots: int) -> HostMemory:
    """Return host memory whose records are padded to whole pages, as for a disk tier."""
    return HostMemory(num_slots, storage.record_bytes, 4096)


def numbers(storage: KVStorage) -> list[int]:
    """Return the number that all values of each block have."""
    found = []
    for block in range(NUM_BLOCKS):
        values = {float(v) for layer in storage.layers for pool in layer.values() for v in pool[block].unique()}
        assert len(values) == 1
        found.append(int(values.pop()))
    return found


@pytest.mark.parametrize("buffer_records", [1, 2, 100])
@pytest.mark.parametrize("seed", range(8))
def test_copies_and_moves_have_the_result_of_running_one_after_the_other(seed, buffer_records, monkeypatch):
    storage, rng = numbered(), random.Random(seed)
    monkeypatch.setattr(moves, "BUFFER_BYTES", buffer_records * storage.record_bytes)
    copies = BlockCopies(storage, Uploader(CPU), CPU, memory(storage, NUM_SLOTS))
    content = {Tier.GPU: list(range(NUM_BLOCKS)), Tier.HOST: [None] * NUM_SLOTS}
    for _ in range(10):
        plan = []
        for _ in range(rng.randint(1, 8)):
            slots = [slot for slot, number in enumerate(content[Tier.HOST]) if number is not None]
            src = host(rng.choice(slots)) if slots and rng.random() < 0.4 else gpu(rng.randrange(NUM_BLOCKS))
            to_host = src.tier is Tier.GPU and rng.random() < 0.6
            dst = host(rng.randrange(NUM_SLOTS)) if to_host else gpu(rng.randrange(NUM_BLOCKS))
            if dst in [copy.dst for copy in plan] or dst == src:
                continue
            plan.append(BlockCopy(src, dst))
            content[dst.tier][dst.number] = content[src.tier][src.number]
        copies.run(plan)
        arrived = copies.poll(1.0)
        assert sorted(arrived) == sorted(Arrival(copy.dst, True) for copy in plan if copy.is_move)
        assert copies.poll(1.0) == []
        assert numbers(storage) == content[Tier.GPU]
    copies.close()


def test_a_runner_without_a_host_tier_refuses_moves():
    copies = BlockCopies(numbered(), Uploader(CPU), CPU)
    with pytest.raises(InternalError, match="host tier"):
        copies.run([BlockCopy(gpu(0), host(0))])


def test_host_memory_that_does_not_exist_is_refused_by_the_name_of_the_setting():
    with pytest.raises(ConfigError, match=r"cache\.host_tier_bytes is too large"):
        HostMemory(1 << 40, 1 << 20)


def test_buffers_are_no_larger_than_the_tier():
    assert buffer_bytes(1000, 3) == 3 * 3 * 1000
    assert buffer_bytes(1000, 10**9) == 3 * (BUFFER_BYTES // 1000) * 1000
    assert buffer_bytes(2 * BUFFER_BYTES, 5) == 3 * 2 * BUFFER_BYTES
    assert buffer_bytes(1000, 0) == 0


def test_closing_frees_the_records():
    storage = numbered()
    copies = BlockCopies(storage, Uploader(CPU), CPU, memory(storage, 2))
    copies.close()
    assert copies._host.records.untyped_storage().nbytes() == 0
