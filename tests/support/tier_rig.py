"""TierRig: a KVCacheManager over real host memory and a real disk store, whose moves arrive when the test says so.

The content of each block is made from its digest. It is carried through the tiers, and compared wherever it can be found.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from engine.kvcache.disk.store import DiskStore
from engine.kvcache.disk_tier import DiskTier
from engine.kvcache.gate import ComputeSeconds, unknown
from engine.kvcache.host_memory import HostMemory
from engine.kvcache.identity import BlockIdentity
from engine.kvcache.kinds import HitRule
from engine.kvcache.manager import KVCacheManager
from engine.plan import PER_TOKEN, Arrival, BlockCopy, PoolKind, Tier
from engine.request import Request, SamplingParams
from tests.support.clock import Clock
from tests.support.disk_store import STUCK, open_store, payload_of, scanned

BLOCK = 4  # tokens
RECORD = 4096  # bytes of a block


class Gate:
    """Holds up the reads or the writes of a store, as a disk that hangs does, until the test lets some of them go on."""

    def __init__(self, store: DiskStore, name: str) -> None:
        """`name` is "read" or "write"."""
        self._permits = threading.Semaphore(0)
        self._do = getattr(store.files, name)
        setattr(store.files, name, self._run)

    def open(self, num: int = 1000) -> None:
        for _ in range(num):
            self._permits.release()

    def _run(self, *args: object) -> object:
        assert self._permits.acquire(timeout=STUCK)
        return self._do(*args)


class TierRig:
    def __init__(
        self,
        folder: Path,
        *,
        blocks: int = 8,
        slots: int = 8,
        records: int = 16,
        kinds: tuple[PoolKind, ...] = PER_TOKEN,
        compute: ComputeSeconds = unknown,
        **settings: object,
    ) -> None:
        self.clock = Clock()
        self._gates: list[Gate] = []
        self.memory = HostMemory(slots, RECORD)
        store = scanned(open_store(folder, records, RECORD, clock=self.clock, **settings))
        self.disk = DiskTier(store, self.memory, HitRule(kinds, BLOCK).inner)
        self.manager = KVCacheManager(
            blocks,
            BLOCK,
            identity=BlockIdentity(BLOCK, key=store.key),
            host_slots=slots,
            disk=self.disk,
            kinds=kinds,
            compute=compute,
            clock=self.clock,
        )
        self.tiers = self.manager.tiers
        self.running: list[Request] = []
        self._gpu: dict[int, bytes] = {}  # content of the blocks
        self._num_requests = 0

    def gate(self, name: str) -> Gate:
        self._gates.append(Gate(self.disk.store, name))
        return self._gates[-1]

    def request(self, tokens: list[int]) -> Request:
        self._num_requests += 1
        params = SamplingParams(max_tokens=50)
        return Request(f"r{self._num_requests}", list(tokens), params, num_prompt=len(tokens), seed=0, max_model_len=1000)

    def compute(self, tokens: list[int] | Request, *, end: int | None = None) -> Request:
        """Admit a request, and compute its tokens up to `end`."""
        request = tokens if isinstance(tokens, Request) else self.request(tokens)
        assert self.manager.admit(request)
        self.running.append(request)
        request.num_computed = len(request.tokens) if end is None else end
        self.manager.publish(request)
        for digest, block in zip(self.manager._chains[request].digests, request.blocks, strict=False):
            if block in self.manager._index:
                self._gpu[block] = payload_of(digest, RECORD)
        return request

    def finish(self, tokens: list[int] | Request) -> list[bytes]:
        """Compute a request and end it, so that its blocks are wanted on disk. Returns the digests of its full blocks."""
        request = self.compute(tokens)
        digests = list(self.manager._chains[request].digests)
        self.end(request, finished=True)
        return digests

    def end(self, request: Request, *, finished: bool = False) -> None:
        if request in self.running:
            self.running.remove(request)
        self.manager.release(request, finished=finished)

    def fill(self) -> None:
        """Overwrite all free GPU blocks with what is not published."""
        manager = self.manager
        request = self.request([10**6 + self._num_requests] * (manager.num_free * BLOCK))
        assert manager.admit(request, match=False)
        manager.release(request)

    def arrive(self, *, ok: bool | Callable[[BlockCopy], bool] = True) -> list[Request]:
        """Carry out the moves that are planned. Returns the requests whose loads have ended."""
        arrivals = []
        for copy in self.manager.take_copies():
            good = ok if isinstance(ok, bool) else ok(copy)
            if good and copy.dst.tier is Tier.HOST:
                self.memory.record(copy.dst.number)[:] = self._gpu.get(copy.src.number, bytes(RECORD))
            elif good:
                self._gpu[copy.dst.number] = bytes(self.memory.record(copy.src.number))
            arrivals.append(Arrival(copy.dst, good))
        ended = self.manager.arrived(arrivals)
        self.check()
        return ended

    def tend(self, until: Callable[[], bool] | None = None) -> list[Request]:
        """Tend the disk tier once, or until a condition holds. Returns the requests whose loads have ended."""
        ended = self.manager.tend()
        while until is not None and not until():
            ended += self.manager.tend(STUCK / 100)
        self.check()
        return ended

    def settle(self) -> list[Request]:
        """Tend and move until nothing is left to do. Returns the requests whose loads have ended."""
        ended = self.tend()
        for _ in range(1000):
            if not (self.tiers.has_work or self.manager.num_moving):
                self.check()
                return ended
            if not self.manager.has_copies:
                ended += self.manager.tend(0.001 if self.disk.is_idle else STUCK / 100)
            ended += self.arrive()
        raise AssertionError("the tiers do not come to rest")

    def saved(self, tokens: list[int]) -> list[bytes]:
        """Have the blocks of a prompt on disk alone. Returns their digests."""
        digests = self.finish(tokens)
        self.settle()
        self.fill()
        self.arrive()
        for slot in list(self.tiers.host._by_digest.values()):
            self.tiers.host.drop(slot)
        self.check()
        return digests

    def on_disk(self, digests: list[bytes]) -> list[int]:
        """Return the numbers of the blocks that the disk has."""
        return [number for number, digest in enumerate(digests) if self.disk.find(digest) is not None]

    def check(self) -> None:
        """Check all invariants, and the content of each block that can be found on the GPU or in the host."""
        self.manager.check(self.running)
        for digest, entry in self.manager._index._by_digest.items():
            for block in (entry.block, *entry.copies):
                assert self._gpu[block] == payload_of(digest, RECORD)
        for slot in self.tiers.host._by_digest.values():
            assert not slot.ready or self.memory.record(slot.number) == payload_of(slot.digest, RECORD)

    def close(self) -> None:
        for gate in self._gates:
            gate.open()
        self.disk.close(STUCK)
