"""Measures the time to first token of a prompt whose KV is computed, or comes from the host tier, the KV cache or the disk tier.

    python -m loadtest.bench_tiers [--model FOLDER] [--prefix TOKENS] [--rounds N] [--disk FOLDER]

Each round has a fresh prompt. It is computed; another prompt of the same length takes its blocks, so that they move to the host
tier; then it comes back from there; then it is asked for once more. Then another engine computes fresh prompts beside a disk tier
and ends, and a third one is asked for them. All must generate the same tokens. Prints a table, and a JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from engine import LLM, CacheConfig, SamplingParams
from server.bundled import bundled_checkpoint

OUTPUT_TOKENS = 8
HOST_BYTES = 2 << 30
DISK_BYTES = 16 << 30


def measure(llm: LLM, prefix: int, rounds: int, vocab: int) -> dict[str, list[float]]:
    """Return the seconds to the first token in each round, by where the KV came from. Raises SystemExit if tokens differ."""
    rng = random.Random(0)
    seconds: dict[str, list[float]] = {"computed": [], "host": [], "device": []}
    for number in range(rounds + 1):
        prompt, other = ([rng.randrange(2, vocab) for _ in range(prefix)] for _ in range(2))
        expected = None
        for source in seconds:
            before = _tokens_from(llm, "host")
            took, tokens = first_token(llm, prompt)
            loaded = _tokens_from(llm, "host") - before
            if (source == "host") != (loaded > 0) or tokens != (expected := expected or tokens):
                raise SystemExit(
                    f"the prompt that should be from {source} loaded {loaded} tokens and gave {tokens}, not {expected}"
                )
            if number:  # round 0 is a warm-up
                seconds[source].append(took)
            if source == "computed":
                first_token(llm, other)
    return seconds


def measure_disk(open_llm: Callable[[], LLM], prefix: int, rounds: int) -> list[float]:
    """Return the seconds to the first token of prompts that an engine before computed. Raises SystemExit if tokens differ, or if
    a prompt is computed again."""
    rng = random.Random(1)
    with open_llm() as llm:
        vocab = llm.info.limits.vocab_size
        prompts = [[rng.randrange(2, vocab) for _ in range(prefix)] for _ in range(rounds + 1)]
        expected = [first_token(llm, prompt)[1] for prompt in prompts]
    seconds = []
    with open_llm() as llm:
        for prompt, right in zip(prompts, expected, strict=True):
            before = _tokens_from(llm, "disk")
            took, tokens = first_token(llm, prompt)
            if tokens != right or _tokens_from(llm, "disk") == before:
                raise SystemExit(f"a prompt from disk gave {tokens}, not {right}, or was computed")
            seconds.append(took)
    return seconds[1:]  # the first is a warm-up


def first_token(llm: LLM, prompt: list[int]) -> tuple[float, list[int]]:
    """Generate from `prompt`. Returns the seconds to the first token, and the tokens."""
    began, took, tokens = time.perf_counter(), 0.0, []
    for event in llm.stream(prompt, SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)):
        took = took or time.perf_counter() - began
        tokens += event.tokens
    return took, tokens


def _tokens_from(llm: LLM, tier: str) -> int:
    return llm.stats().tiers[tier].cached_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder; by default the bundled model Tidepool")
    parser.add_argument("--prefix", type=int, default=3500, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--disk", type=Path, help="folder for a disk tier; by default a temporary one")
    options = parser.parse_args()
    model = options.model or bundled_checkpoint()
    block_size = CacheConfig().block_size
    blocks = -(-(options.prefix + OUTPUT_TOKENS) // block_size) + 2  # a second prompt overwrites nearly all of the first
    cache = CacheConfig(num_blocks=blocks, host_tier_bytes=HOST_BYTES)
    open_llm = partial(LLM, model, max_model_len=blocks * block_size, offline=False)
    with open_llm(cache=cache) as llm:
        info = llm.info
        seconds = measure(llm, options.prefix, options.rounds, info.limits.vocab_size)
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-", dir=options.disk) as folder:
        cache = msgspec.structs.replace(cache, disk_tier_folder=folder, disk_tier_bytes=DISK_BYTES)
        seconds["disk"] = measure_disk(partial(open_llm, cache=cache), options.prefix, options.rounds)
    middle = {source: statistics.median(times) for source, times in seconds.items()}
    table = Table(title=f"time to first token, {options.prefix} tokens in, {info.device}")
    for column in ("KV from", "ms", "of computed"):
        table.add_column(column, justify="right")
    for source, value in middle.items():
        table.add_row(source, f"{1e3 * value:.1f}", f"{value / middle['computed']:.1%}")
    Console().print(table)
    line = {
        "device": info.device if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads",
        "engine": "tidegate",
        "model": info.model,
        "workload": f"TTFT of {options.prefix} tokens from the tiers",
        "ttft_ms": {source: round(1e3 * value, 1) for source, value in middle.items()},
        "host_share": round(middle["host"] / middle["computed"], 3),
        "disk_share": round(middle["disk"] / middle["computed"], 3),
        "rounds": options.rounds,
        "load_average": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
