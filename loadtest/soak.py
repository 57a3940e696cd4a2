"""Runs a soak test: one engine gets mixed random requests and aborts for minutes, and must neither fail nor leak.

    python -m loadtest.soak --model DIR [--load-format dummy] [--seconds 300]

Prompts have 1 to 2,000 tokens, and some share a prefix. Requests ask for 1 to 500 outputs with all kinds of sampling. Up to
twice as many requests as rows are in the engine, and some are aborted. `check()` runs after each step. At the end no block may be
in use, and every request must have ended exactly once.

The device's memory must not grow after the first minute, or after the first fifth of the run if that is shorter. Each growth is
reported with its time, the memory in use, the share that torch's allocator holds, the host's pinned memory (which the device must
map), and the kernels that Triton has loaded since the growth before. Kernels of libraries are loaded at the start; each would
otherwise take memory at its first use.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import time
from collections import Counter
from typing import NamedTuple

import torch

from engine.config import CacheConfig, EngineConfig
from engine.core import Core, build_core
from engine.messages import Submit, pack_tokens
from engine.request import SamplingParams

TEXT = 4000  # tokens of the text that prompts are cut from; prompts that start at the same place share a prefix
STARTS = 40  # number of places in the text at which a prompt can begin


def main() -> None:
    parser = argparse.ArgumentParser(description="Run random requests for minutes; the engine must neither fail nor leak.")
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="safetensors")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--num-blocks", type=int, default=None, help="Blocks of the KV cache; few blocks cause preemptions.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # By default CUDA loads a kernel at its first launch. That takes device memory, 2 MiB at a time, and would look like a leak.
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    cache = CacheConfig(num_blocks=args.num_blocks)
    core = build_core(EngineConfig(model=args.model, load_format=args.load_format, debug_checks=True, cache=cache))
    while core.prepare():
        pass
    print(json.dumps(Soak(core, args.seed).run(args.seconds)))
    core.close()


class Soak:
    def __init__(self, core: Core, seed: int) -> None:
        self._core = core
        self._random = random.Random(seed)
        self._limits = core.info().limits
        self._text = [self._random.randrange(self._limits.vocab_size) for _ in range(TEXT)]
        self._ends: Counter[str] = Counter()  # request id -> number of terminal events so far
        self._under_way: list[str] = []
        self._submitted = 0
        self._loaded = _triton_loads()

    def run(self, seconds: float) -> dict[str, object]:
        """Run for `seconds`, and then until all requests have ended. Returns the figures of the run. Raises AssertionError if the
        engine leaks or a request does not end exactly once."""
        began, settled, tokens, most = time.monotonic(), min(60.0, seconds / 5), 0, _Memory(0, 0, 0)
        growths: list[dict[str, object]] = []  # each growth of the device's memory after the settling time
        while (elapsed := time.monotonic() - began) < seconds:
            self._submit_some()
            self._abort_some()
            tokens += self._step()
            memory = _memory()
            if memory.used > most.used:
                most = memory
                if elapsed >= settled:
                    growths.append({"seconds": round(elapsed, 1), **memory._asdict(), "loaded": self._loaded.copy()})
                self._loaded.clear()
        while self._core.has_work:
            tokens += self._step()
        stats = self._core.stats()
        assert stats.running == stats.waiting == stats.blocks_used == 0, stats
        assert len(self._ends) == self._submitted, f"{self._submitted} submitted, {len(self._ends)} ended"
        assert set(self._ends.values()) == {1}, "a request ended more than once"
        assert not growths, f"device memory grew after {settled:.0f} s: {growths}"
        return {
            "seconds": seconds,
            "requests": self._submitted,
            "aborted": stats.num_aborted,
            "preemptions": stats.num_preemptions,
            "cached_tokens": stats.cached_tokens,
            "output_tokens": tokens,
            "steps": stats.step,
            "memory_bytes": most.used,
        }

    def _submit_some(self) -> None:
        most = 2 * self._core.info().max_num_seqs
        if len(self._under_way) >= most or self._random.random() < 0.5:
            return
        for _ in range(self._random.randint(1, 20)):
            prompt, params = self._prompt(), self._params()
            first = f"soak-{self._submitted}"
            for _ in range(self._random.choice([1, 1, 1, 3])):  # outputs of one prompt: the later ones fork the first
                request_id = f"soak-{self._submitted}"
                fork_of = None if request_id == first else first
                seed = self._random.randrange(1 << 60)
                self._core.submit(
                    Submit(request_id=request_id, prompt=pack_tokens(prompt), params=params, seed=seed, fork_of=fork_of)
                )
                self._submitted += 1
                self._under_way.append(request_id)

    def _prompt(self) -> list[int]:
        longest = min(2000, self._limits.max_model_len - 501)
        begin = self._random.randrange(STARTS) * (TEXT // 2 // STARTS)
        length = self._random.choice([1, self._random.randint(1, 64), self._random.randint(1, longest)])
        own = [self._random.randrange(self._limits.vocab_size)] if self._random.random() < 0.5 else []
        return self._text[begin : begin + length] + own

    def _params(self) -> SamplingParams:
        rng = self._random
        kind = rng.randrange(6)
        most = rng.choice([1, rng.randint(1, 50), rng.randint(1, 500)])
        if kind < 2:
            return SamplingParams(max_tokens=most, temperature=0.0, ignore_eos=kind == 0)
        if kind == 2:
            return SamplingParams(max_tokens=most, temperature=rng.uniform(0.1, 1.5), top_p=rng.uniform(0.5, 1.0), top_k=50)
        if kind == 3:
            return SamplingParams(max_tokens=most, temperature=0.8, min_p=0.05, logit_bias={5: 3.0, 7: -100.0})
        if kind == 4:
            return SamplingParams(
                max_tokens=most,
                temperature=0.0,
                frequency_penalty=0.3,
                presence_penalty=0.2,
                prompt_logprobs=rng.choice([None, 1]),
            )
        return SamplingParams(
            max_tokens=most, temperature=1.0, repetition_penalty=1.1, logprobs=rng.choice([None, 3]), min_tokens=min(3, most)
        )

    def _abort_some(self) -> None:
        if self._under_way and self._random.random() < 0.3:
            self._core.abort(self._random.choice(self._under_way))

    def _step(self) -> int:
        num = 0
        for event in self._core.step():
            num += len(event.tokens)
            if event.finish is not None:
                assert event.failure is None, event.failure
                self._ends[event.request_id] += 1
                self._under_way.remove(event.request_id)
        return num


class _Memory(NamedTuple):
    """Holds how many bytes of memory are in use on the device and on the host."""

    used: int  # bytes on the device that all processes use
    reserved: int  # bytes on the device that this process's torch allocator holds
    pinned: int  # bytes on the host that this process has page-locked


def _memory() -> _Memory:
    """Measure the memory that is in use now. All counts are 0 without a CUDA device."""
    if not torch.cuda.is_available():
        return _Memory(0, 0, 0)
    free, total = torch.cuda.mem_get_info()
    pinned = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    return _Memory(total - free, torch.cuda.memory_reserved(), pinned)


def _triton_loads() -> list[str]:
    """Return a list to which Triton appends the name of each kernel that it loads. The list stays empty without a CUDA device."""
    names: list[str] = []
    if torch.cuda.is_available():
        runtime = importlib.import_module("triton").knobs.runtime
        runtime.kernel_load_end_hook.add(lambda module, function, name, group, key: names.append(name))
    return names


if __name__ == "__main__":
    main()
