"""Measures how fast blocks move between the device and the host tier. `tidegate doctor` runs this module.

It runs in a process of its own, `python -m engine.device.move_rates CONFIG`, since importing torch takes seconds. CONFIG is an
EngineConfig as JSON, with a host tier. The result is one JSON object on standard output, a MoveRates, or {"problem": ...}. No
weight is read: the model is built on the meta device, and only its KV cache is made, with a few blocks.
"""

from __future__ import annotations

import sys
import time
from typing import NamedTuple

import msgspec
import torch

from engine.batch import Uploader, block_bytes
from engine.config import EngineConfig, host_slots, host_stride, resolve
from engine.device.moves import BlockCopies
from engine.errors import TidegateError
from engine.kvcache.host_memory import HostMemory
from engine.kvcache.storage import KVStorage
from engine.models import registry
from engine.models.families import read_spec
from engine.plan import BlockCopy, gpu, host

MOVED_BYTES = 256 << 20  # about so much is moved each way in one round
ROUNDS = 3


class MoveRates(NamedTuple):
    record_bytes: int  # of one block
    block_size: int  # tokens of one block
    out_gb_s: float  # from the device to the host
    in_gb_s: float  # from the host to the device


@torch.inference_mode()
def move_rates(asked: EngineConfig) -> MoveRates:
    """Move blocks of the model's KV cache out and in, by the runner's own code. The best of ROUNDS counts.

    Raises ConfigError or CheckpointError if the model cannot be built, or if the host tier cannot hold a block.
    """
    spec = read_spec(asked.model)
    config = resolve(asked, spec.limits(), has_cuda=torch.cuda.is_available())
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    pools = registry.build(spec, dtype=dtype, device=torch.device("meta")).kv_pools()
    each = block_bytes(pools, config.cache.block_size)
    num = max(1, min(host_slots(config, each), MOVED_BYTES // each))
    storage = KVStorage(pools, num_blocks=num, block_size=config.cache.block_size, device=device)
    memory = HostMemory(num, storage.record_bytes, host_stride(config, storage.record_bytes))
    copies = BlockCopies(storage, Uploader(device), device, memory)
    outward = [BlockCopy(gpu(at), host(at)) for at in range(num)]
    inward = [BlockCopy(copy.dst, copy.src) for copy in outward]
    _seconds(copies, outward)  # the system gives the memory as it is written to
    gigabytes = num * storage.record_bytes / 1e9
    out, back = (gigabytes / min(_seconds(copies, way) for _ in range(ROUNDS)) for way in (outward, inward))
    copies.close()
    return MoveRates(storage.record_bytes, config.cache.block_size, out, back)


def _seconds(copies: BlockCopies, moves: list[BlockCopy]) -> float:
    began = time.perf_counter()
    copies.run(moves)
    num_ended = 0
    while num_ended < len(moves):
        num_ended += len(copies.poll(1.0))
    return time.perf_counter() - began


def main() -> None:
    try:
        answer = move_rates(msgspec.json.decode(sys.argv[1], type=EngineConfig))._asdict()
    except TidegateError as error:
        answer = {"problem": error.message}
    sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")


if __name__ == "__main__":
    main()
