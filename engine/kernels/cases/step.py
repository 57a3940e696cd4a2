"""Benchmark launches of the first and last kernels of a step captured in a CUDA graph: they gather inputs and choose tokens."""

from __future__ import annotations

import torch

from engine.kernels import gather_inputs
from engine.kernels.argmax import argmax_tokens
from engine.kernels.cases.base import BLOCK, Launch, block_tables, random
from engine.kernels.sample_filtered import SampleParams
from engine.kernels.sample_filtered import sample_filtered as sample


def gather_decodes(device: torch.device, seqs: int, context: int) -> Launch:
    tables, latest, rows = _rows(device, seqs, context)
    positions = torch.full((seqs,), context - 1, dtype=torch.int32, device=device)
    num_bytes = rows.nbytes + positions.nbytes + 2 * tables.nbytes + latest.nbytes + seqs * (8 + 8 + 8 + 4)
    return Launch(lambda: gather_inputs.gather_decodes(rows, positions, latest, tables, BLOCK), num_bytes, 0)


def gather_mixed(device: torch.device, seqs: int, chunk: int, context: int) -> Launch:
    """Make a launch of `gather_mixed` for `seqs` decodes and the last `chunk` tokens of one prompt.

    Each decode and the prompt have `context` tokens.
    """
    tables, latest, rows = _rows(device, seqs + 1, context)
    lens = torch.full((seqs + 1,), context, dtype=torch.int32, device=device)
    chunk_positions = torch.arange(context - chunk, context, dtype=torch.int32, device=device)
    positions = torch.cat((lens[:seqs] - 1, chunk_positions))
    owners = torch.cat((rows[:seqs], rows[seqs:].expand(chunk)))
    tokens = torch.cat((torch.full_like(rows[:seqs], -1), chunk_positions))
    num_bytes = 3 * tokens.nbytes + 3 * tokens.shape[0] * 8 + rows.nbytes + lens.nbytes + latest.nbytes + 2 * tables.nbytes
    return Launch(lambda: gather_inputs.gather_mixed(tokens, positions, owners, rows, lens, latest, tables, BLOCK), num_bytes, 0)


def _rows(device: torch.device, seqs: int, context: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make the state of `seqs` batch rows: (block tables [seqs, width], latest tokens [seqs], rows of a step in random order)."""
    rows = torch.randperm(seqs, device=device).to(torch.int32)
    return block_tables(device, seqs, context), torch.zeros(seqs, dtype=torch.int64, device=device), rows


def argmax(device: torch.device, rows: int, vocab: int) -> Launch:
    logits, latest = random(device, rows, vocab), torch.zeros(rows, dtype=torch.int64, device=device)
    at = torch.arange(rows, dtype=torch.int32, device=device)
    num_bytes = logits.nbytes + at.nbytes + 2 * latest.nbytes
    return Launch(lambda: argmax_tokens(logits, at, latest), num_bytes, 0)


def sample_filtered(device: torch.device, rows: int, vocab: int, top_k: int, top_percent: int) -> Launch:
    """Make a launch of the argmax, with which sampling begins, and then of `sample_filtered`.

    The bound is one pass over the logits. The kernels make two passes, and a third if top_k or top_p filters.
    """
    logits, latest = random(device, rows, vocab), torch.zeros(rows, dtype=torch.int64, device=device)
    at = torch.arange(rows, dtype=torch.int32, device=device)
    half, one = (torch.full((rows,), x, dtype=torch.float64, device=device) for x in (0.5, 1.0))
    params = SampleParams(temperature=one, top_k=one * top_k, top_p=one * (top_percent / 100), min_p=one * 0.0)

    def run() -> torch.Tensor:
        tokens = argmax_tokens(logits, at, latest)
        sample(logits, at, latest, tokens, half, params)
        return tokens

    return Launch(run, logits.nbytes, 0)
