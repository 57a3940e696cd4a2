"""Runs a model over a paged KV cache as the runner does: shuffled blocks, prompts in chunks, mixed batches, then decodes."""

from __future__ import annotations

import random

import torch

from engine.batch import ForwardBatch, LayerPools
from engine.models.registry import Model


class PagedRun:
    """Runs sequences through one model with paged KV pools. `step` runs one ForwardBatch and keeps the logits of each
    position."""

    def __init__(self, model: Model, sequences: list[list[int]], *, block_size: int = 4, seed: int = 0) -> None:
        self.model, self.sequences, self.block_size = model, sequences, block_size
        counts = [-(-len(s) // block_size) for s in sequences]
        free = list(range(sum(counts) + 3))
        random.Random(seed).shuffle(free)
        self.tables = [[free.pop() for _ in range(n)] for n in counts]
        self.kv: list[LayerPools] = [
            {p.name: torch.zeros(sum(counts) + 3, block_size, *p.shape, dtype=p.dtype) for p in layer}
            for layer in model.kv_pools()
        ]
        self.computed = [0] * len(sequences)
        self.logits: list[list[torch.Tensor]] = [[] for _ in sequences]

    def batch(self, slices: list[tuple[int, int]], num_decodes: int) -> ForwardBatch:
        """Return the batch of a step. `slices` are pairs of a sequence's index and the number of its tokens that run next."""
        starts = [self.computed[s] for s, _ in slices]
        positions = [p for (_, n), start in zip(slices, starts, strict=True) for p in range(start, start + n)]
        owners = [s for s, n in slices for _ in range(n)]
        size = self.block_size
        width = max(len(self.tables[s]) for s, _ in slices)
        junk = 1 << 20  # fills the entries after a row's own blocks, which the model must not read
        lens = [n for _, n in slices]
        kv_lens = [start + n for start, n in zip(starts, lens, strict=True)]
        return ForwardBatch(
            token_ids=torch.tensor([self.sequences[s][p] for s, p in zip(owners, positions, strict=True)]),
            positions=torch.tensor(positions),
            slots=torch.tensor([self.tables[s][p // size] * size + p % size for s, p in zip(owners, positions, strict=True)]),
            query_starts=torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32),
            kv_lens=torch.tensor(kv_lens, dtype=torch.int32),
            block_tables=torch.tensor(
                [self.tables[s] + [junk] * (width - len(self.tables[s])) for s, _ in slices], dtype=torch.int32
            ),
            num_decodes=num_decodes,
            query_lens_host=lens,
            kv_lens_host=kv_lens,
            kv=self.kv,
        )

    def step(self, slices: list[tuple[int, int]], *, decodes: bool = True) -> None:
        """Run one step. Slices of one token come first. They run as decodes if `decodes` is true, otherwise as chunks."""
        slices = sorted(slices, key=lambda s: s[1] > 1)
        batch = self.batch(slices, sum(n == 1 for _, n in slices) if decodes else 0)
        with torch.inference_mode():
            rows = self.model.logits(self.model(batch))
        for (s, n), part in zip(slices, rows.split(batch.query_lens_host), strict=True):
            self.logits[s] += part
            self.computed[s] += n

    def run(self, num_decoded: int, *, seed: int = 0, decodes: bool = True) -> list[torch.Tensor]:
        """Run every sequence to its end, the last `num_decoded` tokens one by one. Returns the logits [length, V] of each
        sequence."""
        rng = random.Random(seed)
        while pending := [s for s, tokens in enumerate(self.sequences) if self.computed[s] < len(tokens)]:
            slices = []
            for s in pending:
                left = len(self.sequences[s]) - num_decoded - self.computed[s]
                slices.append((s, rng.randint(1, min(left, 9)) if left > 0 else 1))
            if len(slices) > 1 and rng.random() < 0.3:  # leave one sequence out of this step
                slices.pop(rng.randrange(len(slices)))
            self.step(slices, decodes=decodes)
        return [torch.stack(rows) for rows in self.logits]


def random_sequences(vocab: int, lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(n)] for n in lengths]
