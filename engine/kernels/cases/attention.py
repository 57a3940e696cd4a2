"""Benchmark launches of attention over K/V and over latents, and of the kernels before and after latent attention.

As in DeepSeek's models, a head's value is as long as its key without the rotary part. The rotary part is an eighth of the latent
if its size is not given.
"""

from __future__ import annotations

import torch

from engine.kernels import latent_products, mla_prefill
from engine.kernels.cases.base import BLOCK, Launch, block_tables, random
from engine.kernels.hardware import processors
from engine.kernels.latent_prepare import latent_prepare as latent_prepare_kernel
from engine.kernels.mla_decode import decode_splits, merge, mla_decode
from engine.kernels.mla_mixed import mla_mixed
from engine.kernels.mla_mixed import tile_tokens as latent_tile_tokens
from engine.kernels.paged_decode import choose_splits, paged_decode
from engine.kernels.paged_prefill import paged_prefill, tile_tokens
from engine.kernels.query_tiles import Tiles, columns, cut_tiles, map_tiles

HEAD = 128
MOST_QUERIES = 256  # of a captured step of an engine with usual settings


def _lens(device: torch.device, *lens: int) -> torch.Tensor:
    return torch.tensor(lens, dtype=torch.int32, device=device)


def _pairs(tokens: int) -> int:
    """Return the number of (query, key) pairs of causal attention over a whole prompt of `tokens` tokens."""
    return tokens * (tokens + 1) // 2


def decode(device: torch.device, seqs: int, context: int, heads: int, kv_heads: int) -> Launch:
    tables, lens = block_tables(device, seqs, context), _lens(device, *[context] * seqs)
    k, v = (random(device, tables.numel(), BLOCK, kv_heads, HEAD) for _ in range(2))
    q = random(device, seqs, heads, HEAD)
    splits = choose_splits(seqs, kv_heads, processors(device))
    num_bytes = 2 * q.nbytes + 2 * seqs * context * kv_heads * HEAD * q.itemsize
    return Launch(lambda: paged_decode(q, k, v, tables, lens, HEAD**-0.5, splits), num_bytes, 4 * seqs * context * heads * HEAD)


def _prompt_tiles(device: torch.device, seqs: int, context: int, tile: int) -> Tiles:
    """Cut `seqs` whole prompts into tiles."""
    return Tiles(*columns(cut_tiles(range(seqs), [context] * seqs, [context] * seqs, tile)).to(device))


def prefill(device: torch.device, seqs: int, context: int, heads: int, kv_heads: int) -> Launch:
    """Make a launch of `paged_prefill` for `seqs` whole prompts of `context` tokens."""
    tables, lens = block_tables(device, seqs, context), _lens(device, *[context] * seqs)
    k, v = (random(device, tables.numel(), BLOCK, kv_heads, HEAD) for _ in range(2))
    q = random(device, seqs * context, heads, HEAD)
    out = torch.empty_like(q)
    starts = torch.arange(seqs + 1, dtype=torch.int32, device=device) * context
    tiles = _prompt_tiles(device, seqs, context, tile_tokens(heads, kv_heads))
    num_bytes = 2 * q.nbytes + 2 * seqs * context * kv_heads * HEAD * q.itemsize

    def run() -> torch.Tensor:
        paged_prefill(q, k, v, tables, lens, starts, tiles, HEAD**-0.5, out)
        return out

    return Launch(run, num_bytes, 4 * seqs * _pairs(context) * heads * HEAD)


def chunk(device: torch.device, tokens: int, behind: int, heads: int, kv_heads: int) -> Launch:
    """Make a launch of `paged_prefill` for one chunk of `tokens` behind `behind` cached tokens, in the largest captured step."""
    tables, lens, starts = _captured_chunk(device, tokens, behind)
    k, v = (random(device, tables.shape[1], BLOCK, kv_heads, HEAD) for _ in range(2))
    q = random(device, tokens, heads, HEAD)
    out = torch.empty_like(q)
    tiles = map_tiles(starts, tokens, tile_tokens(heads, kv_heads), least=2)

    def run() -> torch.Tensor:
        paged_prefill(q, k, v, tables, lens, starts, tiles, HEAD**-0.5, out)
        return out

    num_bytes = 2 * q.nbytes + 2 * (behind + tokens) * kv_heads * HEAD * q.itemsize
    return Launch(run, num_bytes, 4 * (tokens * behind + _pairs(tokens)) * heads * HEAD)


def latent_chunk(device: torch.device, tokens: int, behind: int, heads: int, latent: int, rope: int) -> Launch:
    """Make a launch of `mla_mixed` for one chunk of `tokens` behind `behind` cached tokens, in the largest captured step."""
    tables, lens, starts = _captured_chunk(device, tokens, behind)
    cache = random(device, tables.shape[1], BLOCK, latent + rope)
    q_latent, q_rope = random(device, tokens, heads, latent), random(device, tokens, heads, rope)
    tiles = map_tiles(starts, tokens, latent_tile_tokens(heads, q_latent.dtype), least=1)
    num_bytes = 2 * q_latent.nbytes + q_rope.nbytes + (behind + tokens) * (latent + rope) * cache.itemsize
    return Launch(
        lambda: mla_mixed(q_latent, q_rope, cache, tables, lens, starts, tiles, 0.1),
        num_bytes,
        2 * (tokens * behind + _pairs(tokens)) * heads * (2 * latent + rope),
    )


def _captured_chunk(device: torch.device, tokens: int, behind: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make block tables, KV lengths and query starts of a step of MOST_QUERIES, of which only the first has tokens."""
    total = behind + tokens
    tables = block_tables(device, 1, total).expand(MOST_QUERIES, -1).contiguous()
    starts = torch.full((MOST_QUERIES + 1,), tokens, dtype=torch.int32, device=device)
    starts[0] = 0
    return tables, _lens(device, *[total] * MOST_QUERIES), starts


def tiles_of_step(device: torch.device, seqs: int, chunk: int, tile: int) -> Launch:
    """Make a launch of `map_tiles` for `seqs` decodes and one chunk of `chunk` tokens."""
    starts = _mixed_starts(device, seqs, chunk)
    tiles = map_tiles(starts, seqs + chunk, tile, least=1)
    num_bytes = starts.nbytes + sum(t.nbytes for t in tiles)
    return Launch(lambda: map_tiles(starts, seqs + chunk, tile, least=1), num_bytes, 0)


def _mixed_starts(device: torch.device, seqs: int, chunk: int) -> torch.Tensor:
    return _lens(device, *range(seqs + 1), seqs + chunk)


def latent_prepare(device: torch.device, rows: int, heads: int, nope: int, rope: int, latent: int) -> Launch:
    q, kv, weight = random(device, rows, heads, nope + rope), random(device, rows, latent + rope), random(device, latent)
    angle = torch.randn(rows, 1, rope, device=device)
    pool = random(device, -(-rows // BLOCK), BLOCK, latent + rope)
    slots = torch.randperm(rows, device=device)
    num_bytes = 2 * rows * heads * rope * q.itemsize + 3 * kv.nbytes + weight.nbytes + 2 * angle.nbytes + slots.nbytes
    return Launch(
        lambda: latent_prepare_kernel(q, kv, (weight, 1e-6), (angle, angle), slots, pool, interleaved=True), num_bytes, 0
    )


def absorb(device: torch.device, rows: int, heads: int, nope: int, rope: int, latent: int) -> Launch:
    q, kv_b = random(device, rows, heads, nope + rope), random(device, heads, 2 * nope, latent)
    num_bytes = q.itemsize * heads * (rows * (nope + latent) + nope * latent)
    return Launch(lambda: latent_products.absorb(q, kv_b, nope), num_bytes, 2 * rows * heads * nope * latent)


def expand(device: torch.device, rows: int, heads: int, nope: int, latent: int) -> Launch:
    mixed, kv_b = random(device, rows, heads, latent), random(device, heads, 2 * nope, latent)
    out = random(device, rows, heads, nope)

    def run() -> torch.Tensor:
        latent_products.expand(mixed, kv_b, nope, out)
        return out

    num_bytes = mixed.nbytes + out.nbytes + kv_b.nbytes // 2
    return Launch(run, num_bytes, 2 * rows * heads * nope * latent)


def latent_alone(device: torch.device, context: int, heads: int, nope: int, rope: int, latent: int) -> Launch:
    """Make a launch of all latent attention kernels for a decode of one sequence, from absorb to expand."""
    q, kv_b = random(device, 1, heads, nope + rope), random(device, heads, 2 * nope, latent)
    tables, lens, out = block_tables(device, 1, context), _lens(device, context), random(device, 1, heads, nope)
    cache = random(device, tables.numel(), BLOCK, latent + rope)
    splits = decode_splits(1, heads, processors(device), q.dtype)

    def run() -> torch.Tensor:
        q_latent = latent_products.absorb_few(q, kv_b, nope)
        latent_products.merge_expand(*mla_decode(q_latent, q[..., nope:], cache, tables, lens, 0.1, splits), kv_b, nope, out)
        return out

    num_bytes = q.nbytes + kv_b.nbytes + context * (latent + rope) * cache.itemsize + out.nbytes
    return Launch(run, num_bytes, 2 * heads * (2 * nope * latent + context * (2 * latent + rope)))


def build_keys(device: torch.device, rows: int, heads: int, nope: int, rope: int, latent: int) -> Launch:
    expanded, records = random(device, rows, heads, 2 * nope), random(device, rows, latent + rope)
    num_bytes = rows * expanded.itemsize * (heads * (2 * nope + rope) + rope)
    return Launch(lambda: latent_products.build_keys(expanded, records, nope, latent), num_bytes, 0)


def latent_decode(device: torch.device, seqs: int, context: int, heads: int, latent: int, rope: int) -> Launch:
    tables, lens = block_tables(device, seqs, context), _lens(device, *[context] * seqs)
    cache = random(device, tables.numel(), BLOCK, latent + rope)
    q_latent, q_rope = random(device, seqs, heads, latent), random(device, seqs, heads, rope)
    splits = decode_splits(seqs, heads, processors(device), q_latent.dtype)
    num_bytes = 2 * q_latent.nbytes + q_rope.nbytes + seqs * context * (latent + rope) * cache.itemsize
    return Launch(
        lambda: merge(mla_decode(q_latent, q_rope, cache, tables, lens, 0.1, splits), q_latent.dtype),
        num_bytes,
        2 * seqs * context * heads * (2 * latent + rope),
    )


def latent_prefill(device: torch.device, seqs: int, context: int, heads: int, nope: int, rope: int) -> Launch:
    """Make a launch of `mla_prefill` for `seqs` whole prompts of `context` tokens, without the expansion of their latents."""
    rows = seqs * context
    q, k_rope = random(device, rows, heads, nope + rope), random(device, rows, rope)
    expanded, out = random(device, rows, heads, 2 * nope), random(device, rows, heads, nope)
    tile = mla_prefill.choose_tile(q.dtype)
    starts, lens = torch.arange(seqs + 1, dtype=torch.int32, device=device) * context, _lens(device, *[context] * seqs)
    query, first, _ = _prompt_tiles(device, seqs, context, tile.queries)
    tiles = torch.stack((query, first, query * context))

    def run() -> torch.Tensor:
        mla_prefill.mla_prefill(out, q, expanded, k_rope, starts, lens, tiles, 0.1, tile)
        return out

    num_bytes = q.nbytes + expanded.nbytes + k_rope.nbytes + out.nbytes
    return Launch(run, num_bytes, 2 * seqs * _pairs(context) * heads * (2 * nope + rope))


def latent_mixed(device: torch.device, seqs: int, chunk: int, context: int, heads: int, latent: int) -> Launch:
    """Make a launch of `mla_mixed` for `seqs` decodes with `context` tokens in the KV cache and one prompt of `chunk` tokens."""
    rope, tokens = latent // 8, seqs + chunk
    tables, lens = block_tables(device, seqs + 1, max(context, chunk)), _lens(device, *[context] * seqs, chunk)
    cache = random(device, tables.numel(), BLOCK, latent + rope)
    q_latent, q_rope = random(device, tokens, heads, latent), random(device, tokens, heads, rope)
    starts = _mixed_starts(device, seqs, chunk)
    tiles = map_tiles(starts, tokens, latent_tile_tokens(heads, q_latent.dtype), least=1)
    num_bytes = 2 * q_latent.nbytes + q_rope.nbytes + (seqs * context + chunk) * (latent + rope) * cache.itemsize
    return Launch(
        lambda: mla_mixed(q_latent, q_rope, cache, tables, lens, starts, tiles, 0.1),
        num_bytes,
        2 * (seqs * context + _pairs(chunk)) * heads * (2 * latent + rope),
    )
