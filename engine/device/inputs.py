"""Turns a plan's short lists into a ForwardBatch, with numpy over all slices at once.

    host      each row's tokens at admission, and its block table     read by the plan's positions
    device    block tables, and the latest sampled token              changed by the plan and by sampling

Everything that a step needs on the device goes there in one copy. Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import ForwardBatch, LayerPools, Upload
from engine.errors import InternalError
from engine.plan import GrownRow, SpilledContext, StepPlan

Ints = npt.NDArray[np.int64]


class Slices(NamedTuple):
    """The B slices of a plan as arrays, and which S of the slices sample a token."""

    rows: Ints  # [B]: the batch row of each slice
    starts: Ints  # [B]: the first position of each slice
    nums: Ints  # [B]: the number of tokens of each slice
    first: Ints  # [B + 1]: where each slice begins among the step's tokens
    samples: Ints  # [S]: indices of the slices that sample

    @property
    def ends(self) -> Ints:
        return self.starts + self.nums

    @staticmethod
    def of(plan: StepPlan) -> Slices:
        nums = np.array(plan.nums, np.int64)
        first = np.concatenate(([0], nums.cumsum()))
        return Slices(
            np.array(plan.rows, np.int64), np.array(plan.starts, np.int64), nums, first, np.array(plan.samples, np.int64)
        )


class RowState(NamedTuple):
    """The state of each batch row that is kept on the device. The last row is the scratch row, which pads batches."""

    tables: torch.Tensor  # [rows + 1, width] int32: KV block tables; entries past a row's own blocks are from earlier requests
    latest: torch.Tensor  # [rows + 1] int64: the token sampled last, always a valid token id

    @property
    def scratch_row(self) -> int:
        return self.latest.shape[0] - 1


class PreparedStep(NamedTuple):
    """The inputs of a planned step as device tensors."""

    batch: ForwardBatch
    sampled_rows: torch.Tensor  # [S] int64: the batch rows for which this step samples a token
    last_index: torch.Tensor  # [S] int64: index of each sampling slice's last token among the step's tokens


class Rows:
    """The tokens and KV block tables of every batch row.

    `tokens[row]` are the tokens known at admission. Later tokens exist on the device only.
    """

    def __init__(
        self, *, max_rows: int, max_len: int, block_size: int, scratch_block: int, device: torch.device, upload: Upload
    ) -> None:
        self._block_size = block_size
        self._upload = upload
        width = -(-max_len // block_size)
        self.tokens: list[Ints] = [np.zeros(0, np.int64)] * max_rows
        self._num_known = np.zeros(max_rows, np.int64)
        self._tables = np.zeros((max_rows, width), np.int64)  # entries past a row's own blocks are from earlier requests
        self.state = RowState(
            torch.full((max_rows + 1, width), scratch_block, dtype=torch.int32, device=device),
            torch.zeros(max_rows + 1, dtype=torch.int64, device=device),
        )

    def set_latest(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """Set the latest token of rows [S] int64 to tokens [S] int64, which must be valid token ids."""
        self.state.latest.index_copy_(0, rows, tokens)

    def apply(self, plan: StepPlan) -> None:
        """Apply the plan's admissions and the growth of KV block tables, on the host and on the device."""
        if not plan.admitted and not plan.grown:
            return
        indices, blocks = self._upload(self._apply_on_host(plan))
        self.state.tables.view(-1).index_copy_(0, indices, blocks)

    def batch(self, plan: StepPlan, slices: Slices, kv: list[LayerPools], *, all_read: bool = False) -> PreparedStep:
        """Build the device tensors of a step. The plan must have been applied and have at least one slice.

        With `all_read`, the hidden states of all tokens are read. Otherwise only those of tokens after which the step samples are
        read.
        """
        positions = self._positions(slices)
        owners = np.repeat(slices.rows, slices.nums)
        block, offset = np.divmod(positions, self._block_size)
        slots = self._tables[owners, block] * self._block_size + offset
        token_ids, from_device = self._tokens(slices)
        kv_lens = slices.ends
        last = slices.first[slices.samples + 1] - 1
        arrays: list[npt.NDArray[Any]] = [
            token_ids,
            positions,
            slots,
            slices.first.astype(np.int32),
            kv_lens.astype(np.int32),
            slices.rows,
        ]
        arrays += [slices.rows[slices.samples], last, slices.first[from_device], slices.rows[from_device]]
        arrays.append(kv_lens[slices.samples].astype(np.int32))
        t = self._upload(arrays)
        if from_device.size:
            t[0].index_copy_(0, t[8], self.state.latest.index_select(0, t[9]))
        width = -(-int(kv_lens.max()) // self._block_size)
        batch = ForwardBatch(
            token_ids=t[0],
            positions=t[1],
            slots=t[2],
            query_starts=t[3],
            kv_lens=t[4],
            block_tables=self.state.tables[:, :width].index_select(0, t[5]),
            num_decodes=plan.num_decodes,
            query_lens_host=plan.nums,
            kv_lens_host=kv_lens.tolist(),
            kv=kv,
        )
        if not all_read and last.size < positions.size:
            tables = self.state.tables[:, :width].index_select(0, t[6])
            batch = replace(batch, read=batch.last_tokens(t[7], t[10], tables, kv_lens[slices.samples].tolist()))
        return PreparedStep(batch, t[6], t[7])

    def spilled_batch(
        self, plan: StepPlan, slices: Slices, context: SpilledContext, kv: list[LayerPools], *, all_read: bool = False
    ) -> PreparedStep:
        """Build the device tensors of a step of one slice, whose row's context is `context`. See `batch`."""
        positions, num_before = self._positions(slices), len(context.slots)
        block, offset = np.divmod(positions, self._block_size)
        table = np.array(context.blocks, np.int64)
        token_ids, from_device = self._tokens(slices)
        last = slices.first[slices.samples + 1] - 1
        arrays: list[npt.NDArray[Any]] = [token_ids, positions, table[block - num_before] * self._block_size + offset]
        arrays += [slices.first.astype(np.int32), slices.ends.astype(np.int32), table.astype(np.int32)[None]]
        arrays += [slices.rows, slices.rows[slices.samples], last]
        ids, positions_there, slots, starts, kv_lens, tables, rows, sampled_rows, last_index = self._upload(arrays)
        batch = ForwardBatch(
            token_ids=self.state.latest.index_select(0, rows) if from_device.size else ids,
            positions=positions_there,
            slots=slots,
            query_starts=starts,
            kv_lens=kv_lens,
            block_tables=tables,
            num_decodes=plan.num_decodes,
            query_lens_host=plan.nums,
            kv_lens_host=slices.ends.tolist(),
            kv=kv,
            spilled=torch.tensor(context.slots, dtype=torch.int64),
        )
        if not all_read and last.size < positions.size:
            num = last.size
            batch = replace(batch, read=batch.last_tokens(last_index, kv_lens[:num], tables[:num], batch.kv_lens_host[:num]))
        return PreparedStep(batch, sampled_rows, last_index)

    def all_sampled(self, slices: Slices) -> bool:
        """Whether every slice begins with its row's latest sampled token. False if a slice is a prompt of one token."""
        return bool(np.all(slices.starts >= self._num_known[slices.rows]))

    def mixed(self, slices: Slices) -> tuple[Ints, Ints, Ints]:
        """Return the id, position and batch row of each of the step's T tokens, as three arrays [T].

        Id -1 stands for the row's latest sampled token.
        """
        token_ids, from_device = self._tokens(slices)
        token_ids[slices.first[from_device]] = -1
        return token_ids, self._positions(slices), np.repeat(slices.rows, slices.nums)

    def _apply_on_host(self, plan: StepPlan) -> tuple[Ints, npt.NDArray[np.int32]]:
        """Write the plan's admissions and growth into the host's block tables.

        Returns (flat indices, blocks) to write into the device's tables.
        """
        indices, blocks = [], []
        for a in plan.admitted:
            self.tokens[a.row] = np.array(a.tokens, np.int64)
            self._num_known[a.row] = len(a.tokens)
        changes = [*(GrownRow(a.row, 0, a.blocks) for a in plan.admitted), *plan.grown]
        width = self._tables.shape[1]
        for row, length, new in changes:
            if length + len(new) > width:
                raise InternalError(f"row {row} is given {length + len(new)} blocks; the longest context has {width}")
            self._tables[row, length : length + len(new)] = new
            indices.append(np.arange(row * width + length, row * width + length + len(new)))
            blocks.append(np.array(new, np.int32))
        return np.concatenate(indices), np.concatenate(blocks)

    @staticmethod
    def _positions(slices: Slices) -> Ints:
        return np.arange(slices.first[-1]) + np.repeat(slices.starts - slices.first[:-1], slices.nums)

    def _tokens(self, slices: Slices) -> tuple[Ints, Ints]:
        """Return the step's token ids, and the indices of the slices whose only token is the row's latest sampled token.

        The host may not know that token yet, so its id is 0 in the result.
        """
        token_ids = np.zeros(slices.first[-1], np.int64)
        unknown = slices.starts >= self._num_known[slices.rows]
        from_device = np.flatnonzero(unknown)
        for i in np.flatnonzero(~unknown).tolist():
            start, num = int(slices.starts[i]), int(slices.nums[i])
            begin = slices.first[i]
            token_ids[begin : begin + num] = self.tokens[slices.rows[i]][start : start + num]
        return token_ids, from_device
