"""Kernels that build the inputs of a step captured in a CUDA graph on the device, from the state of its batch rows.

Every CUDA graph of a step begins with one of these kernels. The host then uploads only rows, positions and, in a mixed step,
prompt tokens; token ids, KV slots, lengths and block tables are gathered from the rows' latest tokens and block tables.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from engine.kernels.launch import cdiv, pdl

TABLE_TILE = 128  # block numbers, or tokens, that a program gathers in one pass of its loop


class GatheredInputs(NamedTuple):
    """The gathered fields of a ForwardBatch, for T tokens of B queries. T = B if all queries are decodes."""

    token_ids: torch.Tensor  # [T] int64: id of each token
    positions: torch.Tensor  # [T] int64: position of each token in its sequence
    slots: torch.Tensor  # [T] int64: where each token's KV is written
    kv_lens: torch.Tensor  # [B] int32: tokens of each query's sequence after the step
    block_tables: torch.Tensor  # [B, width] int32: KV blocks of each query; only entries of used blocks are written


@triton.jit(do_not_specialize=["width"])
def _gather_decodes(
    rows_ptr, positions_ptr, latest_ptr, tables_ptr, token_out, position_out, slot_out, len_out, table_out, width,
    BLOCK: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (query,) gathers the token, position, KV slot, length and block table (`width` blocks) of one decode."""
    seq = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.load(rows_ptr + seq).to(tl.int64)
    position = tl.load(positions_ptr + seq)
    last_block = position // BLOCK
    slot = tl.load(tables_ptr + row * width + last_block).to(tl.int64) * BLOCK + position % BLOCK
    tl.store(token_out + seq, tl.load(latest_ptr + row))
    tl.store(position_out + seq, position.to(tl.int64))
    tl.store(slot_out + seq, slot)
    tl.store(len_out + seq, position + 1)
    for begin in range(0, last_block + 1, TILE):
        at = begin + tl.arange(0, TILE)
        blocks = tl.load(tables_ptr + row * width + at, mask=at <= last_block)
        tl.store(table_out + seq.to(tl.int64) * width + at, blocks, mask=at <= last_block)


def gather_decodes(
    rows: torch.Tensor, positions: torch.Tensor, latest: torch.Tensor, tables: torch.Tensor, block_size: int
) -> GatheredInputs:
    """Gather the inputs of a step of B decodes: each of the batch rows `rows` [B] int32 has one token at `positions` [B] int32.

    latest [R] int64 holds the latest token of every batch row, and tables [R, width] int32 its KV block table.
    grid: (B,); a program gathers one query.
    """
    num, width = rows.shape[0], tables.shape[1]
    token_ids, positions_out, slots = (torch.empty(num, dtype=torch.int64, device=rows.device) for _ in range(3))
    kv_lens = torch.empty(num, dtype=torch.int32, device=rows.device)
    block_tables = torch.empty(num, width, dtype=torch.int32, device=rows.device)
    _gather_decodes[(num,)](
        rows, positions, latest, tables, token_ids, positions_out, slots, kv_lens, block_tables, width,
        BLOCK=block_size, TILE=TABLE_TILE, num_warps=1, **pdl(rows.device),
    )  # fmt: skip
    return GatheredInputs(token_ids, positions_out, slots, kv_lens, block_tables)


@triton.jit(do_not_specialize=["num_tokens", "num_token_tiles", "width"])
def _gather_mixed(
    tokens_ptr, positions_ptr, owners_ptr, rows_ptr, lens_ptr, latest_ptr, tables_ptr,
    token_out, position_out, slot_out, table_out, num_tokens, num_token_tiles, width,
    BLOCK: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gather a mixed step's inputs. The first `num_token_tiles` programs gather token, position and KV slot of TILE tokens each.

    Each other program gathers the block table of one query.
    """
    program = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if program < num_token_tiles:
        at = program * TILE + tl.arange(0, TILE)
        inside = at < num_tokens
        owner = tl.load(owners_ptr + at, mask=inside, other=0).to(tl.int64)
        position = tl.load(positions_ptr + at, mask=inside, other=0)
        token = tl.load(tokens_ptr + at, mask=inside, other=0).to(tl.int64)
        sampled = tl.load(latest_ptr + owner, mask=inside & (token < 0), other=0)
        block = tl.load(tables_ptr + owner * width + position // BLOCK, mask=inside, other=0).to(tl.int64)
        tl.store(token_out + at, tl.where(token < 0, sampled, token), mask=inside)
        tl.store(position_out + at, position.to(tl.int64), mask=inside)
        tl.store(slot_out + at, block * BLOCK + position % BLOCK, mask=inside)
    else:
        query = program - num_token_tiles
        row = tl.load(rows_ptr + query).to(tl.int64)
        num_blocks = tl.cdiv(tl.load(lens_ptr + query), BLOCK)
        for begin in range(0, num_blocks, TILE):
            at = begin + tl.arange(0, TILE)
            blocks = tl.load(tables_ptr + row * width + at, mask=at < num_blocks)
            tl.store(table_out + query.to(tl.int64) * width + at, blocks, mask=at < num_blocks)


def gather_mixed(
    tokens: torch.Tensor,
    positions: torch.Tensor,
    owners: torch.Tensor,
    rows: torch.Tensor,
    kv_lens: torch.Tensor,
    latest: torch.Tensor,
    tables: torch.Tensor,
    block_size: int,
) -> GatheredInputs:
    """Gather the inputs of a mixed step of T tokens and B queries.

    tokens, positions and owners [T] int32 describe each token: its id (-1: the batch row's latest token), its position and its
    batch row. rows and kv_lens [B] int32 describe each query: its batch row, and its number of tokens in the KV cache after the
    step. latest [R] int64 holds the latest token of every batch row, and tables [R, width] int32 its KV block table.
    grid: (ceil(T / TABLE_TILE) + B,); the first programs gather TABLE_TILE tokens each, the others one query's block table each.
    """
    num, width = tokens.shape[0], tables.shape[1]
    token_ids, positions_out, slots = (torch.empty(num, dtype=torch.int64, device=rows.device) for _ in range(3))
    block_tables = torch.empty(rows.shape[0], width, dtype=torch.int32, device=rows.device)
    token_tiles = cdiv(num, TABLE_TILE)
    _gather_mixed[(token_tiles + rows.shape[0],)](
        tokens, positions, owners, rows, kv_lens, latest, tables,
        token_ids, positions_out, slots, block_tables, num, token_tiles, width,
        BLOCK=block_size, TILE=TABLE_TILE, num_warps=1, **pdl(rows.device),
    )  # fmt: skip
    return GatheredInputs(token_ids, positions_out, slots, kv_lens, block_tables)
