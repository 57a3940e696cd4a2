"""Measures the time to first token of a prompt whose KV is computed, comes from the host tier, or is still in the KV cache.

    python -m loadtest.bench_tiers [--model FOLDER] [--prefix TOKENS] [--rounds N]

Each round has a fresh prompt. It is computed; another prompt of the same length takes its blocks, so that they move to the host
tier; then it comes back from there; then it is asked for once more. All three must generate the same tokens. Prints a table, and
a JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from engine import LLM, CacheConfig, SamplingParams
from server.bundled import bundled_checkpoint

OUTPUT_TOKENS = 8
HOST_BYTES = 2 << 30


def measure(llm: LLM, prefix: int, rounds: int, vocab: int) -> dict[str, list[float]]:
    """Return the seconds to the first token in each round, by where the KV came from. Raises SystemExit if tokens differ."""
    rng = random.Random(0)
    seconds: dict[str, list[float]] = {"computed": [], "host": [], "device": []}
    for number in range(rounds + 1):
        prompt, other = ([rng.randrange(2, vocab) for _ in range(prefix)] for _ in range(2))
        expected = None
        for source in seconds:
            before = _tokens_from_host(llm)
            took, tokens = first_token(llm, prompt)
            loaded = _tokens_from_host(llm) - before
            if (source == "host") != (loaded > 0) or tokens != (expected := expected or tokens):
                raise SystemExit(
                    f"the prompt that should be from {source} loaded {loaded} tokens and gave {tokens}, not {expected}"
                )
            if number:  # round 0 is a warm-up
                seconds[source].append(took)
            if source == "computed":
                first_token(llm, other)
    return seconds


def first_token(llm: LLM, prompt: list[int]) -> tuple[float, list[int]]:
    """Generate from `prompt`. Returns the seconds to the first token, and the tokens."""
    began, took, tokens = time.perf_counter(), 0.0, []
    for event in llm.stream(prompt, SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)):
        took = took or time.perf_counter() - began
        tokens += event.tokens
    return took, tokens


def _tokens_from_host(llm: LLM) -> int:
    return llm.stats().tiers["host"].cached_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder; by default the bundled model Tidepool")
    parser.add_argument("--prefix", type=int, default=3500, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = options.model or bundled_checkpoint()
    block_size = CacheConfig().block_size
    blocks = -(-(options.prefix + OUTPUT_TOKENS) // block_size) + 2  # a second prompt overwrites nearly all of the first
    cache = CacheConfig(num_blocks=blocks, host_tier_bytes=HOST_BYTES)
    with LLM(model, cache=cache, max_model_len=blocks * block_size, offline=False) as llm:
        info = llm.info
        seconds = measure(llm, options.prefix, options.rounds, info.limits.vocab_size)
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
        "workload": f"TTFT of {options.prefix} tokens from the host tier",
        "ttft_ms": {source: round(1e3 * value, 1) for source, value in middle.items()},
        "host_share": round(middle["host"] / middle["computed"], 3),
        "rounds": options.rounds,
        "load_average": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
