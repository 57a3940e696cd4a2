"""Measures tokens per second on this CPU, and compares them with `transformers.generate` on the same random weights (0.1B Llama,
float32).

    transformers   one stream, greedy, with its default settings
    one stream     Tidegate
    16 streams     Tidegate, all submitted at once

The three run alternately, and the best round of each counts, since other processes may use the same cores. All three must
generate the same tokens. Prints a table, and a JSON line last.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from engine import LLM, CacheConfig, SamplingParams
from engine.models import registry
from engine.models.families import read_spec

ROUNDS = 3
PROMPT_TOKENS, OUTPUT_TOKENS, STREAMS = 128, 64, 16
VOCAB = 32000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def write_checkpoint(folder: Path) -> None:
    """Write a checkpoint with random weights of standard deviation 0.02 and norm weights of 1. Tidegate and transformers load
    it."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    model = registry.build(read_spec(folder), dtype=torch.float32, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.ones(t.shape) if name.endswith("norm.weight") else torch.randn(t.shape, generator=generator) * 0.02
        for name, t in model.weights().targets.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def their_stream(folder: Path) -> Callable[[list[list[int]]], list[list[int]]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # generate to the full length; min_new_tokens would be slower

    def run(prompts: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=OUTPUT_TOKENS,
            do_sample=False,
        )
        tokens: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return tokens

    return run


def our_streams(llm: LLM) -> Callable[[list[list[int]]], list[list[int]]]:
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    return lambda prompts: [c.token_ids for c in llm.generate(prompts, params)]


def rate(run: Callable[[list[list[int]]], list[list[int]]], prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
    """Generate outputs for `prompts`. Returns the output tokens per second and the tokens."""
    began = time.perf_counter()
    tokens = run(prompts)
    return sum(map(len, tokens)) / (time.perf_counter() - began), tokens


def measure(folder: Path) -> dict[str, list[float]]:
    """Return the output tokens per second of each contender in each round. Raises SystemExit if the contenders' tokens differ."""
    rng = random.Random(0)
    prompts = [[rng.randrange(VOCAB) for _ in range(PROMPT_TOKENS)] for _ in range(STREAMS)]
    with LLM(folder, device="cpu", cache=CacheConfig(prefix_caching=False)) as llm:
        theirs, ours = their_stream(folder), our_streams(llm)
        contenders = {"transformers": (theirs, prompts[:1]), "one": (ours, prompts[:1]), "many": (ours, prompts)}
        rounds: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(ROUNDS + 1):
            tokens = {}
            for name, (run, some) in contenders.items():
                speed, tokens[name] = rate(run, some)
                if number:  # round 0 is a warm-up
                    rounds[name].append(round(speed, 2))
            if not tokens["transformers"][0] == tokens["one"][0] == tokens["many"][0]:
                raise SystemExit("transformers, one stream and many streams did not generate the same tokens")
    return rounds


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        rounds = measure(Path(folder))
    best = {name: max(speeds) for name, speeds in rounds.items()}
    ratios = {"ratio_single": best["one"] / best["transformers"], "ratio_16": best["many"] / best["one"]}
    table = Table(title=f"{PROMPT_TOKENS} tokens in, {OUTPUT_TOKENS} out, float32, {torch.get_num_threads()} threads")
    for column in ("", "output tok/s", "", "target"):
        table.add_column(column, justify="right")
    table.add_row("transformers, 1 stream", f"{best['transformers']:.1f}", "", "")
    table.add_row("tidegate, 1 stream", f"{best['one']:.1f}", f"{ratios['ratio_single']:.2f} x transformers", "1.00")
    table.add_row(f"tidegate, {STREAMS} streams", f"{best['many']:.1f}", f"{ratios['ratio_16']:.2f} x one stream", "4.00")
    Console().print(table)
    line = {
        "device": f"CPU, {torch.get_num_threads()} threads",
        "engine": "tidegate",
        "model": "llama-0.1b",
        "precision": "float32",
        "workload": f"{PROMPT_TOKENS} in, {OUTPUT_TOKENS} out, 1 and {STREAMS} streams",
        "out_tok_s": best["many"],
        "single_tok_s": best["one"],
        "transformers_tok_s": best["transformers"],
        **ratios,
        "rounds": rounds,
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}))


if __name__ == "__main__":
    main()
