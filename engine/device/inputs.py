"""From a plan's short lists to a ForwardBatch: what a row is, kept from step to step, and numpy over all slices at once.

    host      tokens as admitted, block tables               the plan's positions are looked up here
    device    block tables, the latest sampled token         changed by what the plan says and what was sampled

Everything a step needs on the device goes there in one copy. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import ForwardBatch, LayerPools
from engine.errors import InternalError
from engine.plan import GrownRow, StepPlan

Ints = npt.NDArray[np.int64]
_ALIGN = 16  # bytes: each array begins where any dtype may


class Uploader:
    """Copies host arrays to the device: on CUDA all of one call in a single transfer that the host does not wait for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, arrays: Sequence[npt.NDArray[Any]]) -> list[torch.Tensor]:
        if self._device.type == "cpu":
            return [torch.from_numpy(a) for a in arrays]
        ends = np.cumsum([-(-a.nbytes // _ALIGN) * _ALIGN for a in arrays]).tolist()
        # From torch's cache of pinned memory, which keeps the buffer until the copy out of it is done.
        staging = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)
        flat = staging.numpy()
        begins = [0, *ends[:-1]]
        for begin, a in zip(begins, arrays, strict=True):
            flat[begin : begin + a.nbytes] = a.reshape(-1).view(np.uint8)
        there = staging.to(self._device, non_blocking=True)
        return [_view(there[begin : begin + a.nbytes], a) for begin, a in zip(begins, arrays, strict=True)]


def _view(data: torch.Tensor, like: npt.NDArray[Any]) -> torch.Tensor:
    return data.view(torch.from_numpy(np.empty(0, like.dtype)).dtype).view(like.shape)


class Slices(NamedTuple):
    """A plan's slices as arrays, and which of them sample. B slices, S samples."""

    rows: Ints  # [B]
    starts: Ints  # [B]
    nums: Ints  # [B]
    first: Ints  # [B + 1]: where each slice begins in the step's tokens
    samples: Ints  # [S]: slices

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
    """What the device remembers of each row. The last row is nobody's: batches are padded with it."""

    tables: torch.Tensor  # [rows + 1, width] int32; entries past a row's own blocks are some old ones
    latest: torch.Tensor  # [rows + 1] int64: the token sampled last

    @property
    def scratch_row(self) -> int:
        return self.latest.shape[0] - 1


class StepInputs(NamedTuple):
    batch: ForwardBatch
    sampled_rows: torch.Tensor  # [S] int64
    last_index: torch.Tensor  # [S] int64: the sampling slices' last tokens


class Rows:
    """The rows' tokens and blocks. `tokens[row]` are those known at admission; later ones exist on the device alone."""

    def __init__(
        self, *, max_rows: int, max_len: int, block_size: int, scratch_block: int, device: torch.device, upload: Uploader
    ) -> None:
        self._block_size = block_size
        self._upload = upload
        width = -(-max_len // block_size)
        self.tokens: list[Ints] = [np.zeros(0, np.int64)] * max_rows
        self._num_known = np.zeros(max_rows, np.int64)
        self._tables = np.zeros((max_rows, width), np.int64)  # entries past a row's own blocks are some old ones
        self.state = RowState(
            torch.full((max_rows + 1, width), scratch_block, dtype=torch.int32, device=device),
            torch.zeros(max_rows + 1, dtype=torch.int64, device=device),
        )

    def set_latest(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        self.state.latest.index_copy_(0, rows, tokens)

    def change(self, plan: StepPlan) -> None:
        """Take in the rows that the plan admits and the blocks that it adds."""
        if not plan.admitted and not plan.grown:
            return
        indices, blocks = self._upload(self._change(plan))
        self.state.tables.view(-1).index_copy_(0, indices, blocks)

    def batch(self, plan: StepPlan, slices: Slices, kv: list[LayerPools], *, all_read: bool = False) -> StepInputs:
        """The batch of a plan that is taken in. A plan has at least one slice. Unless `all_read`, only the tokens that samples
        follow are."""
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
        return StepInputs(batch, t[6], t[7])

    def all_sampled(self, slices: Slices) -> bool:
        """Whether each slice begins with its row's latest sample: a decode, and no prompt of one token."""
        return bool(np.all(slices.starts >= self._num_known[slices.rows]))

    def mixed(self, slices: Slices) -> tuple[Ints, Ints, Ints]:
        """Of each token of the step: itself (-1: its row's latest sample), its position and its row."""
        token_ids, from_device = self._tokens(slices)
        token_ids[slices.first[from_device]] = -1
        return token_ids, self._positions(slices), np.repeat(slices.rows, slices.nums)

    def _change(self, plan: StepPlan) -> tuple[Ints, npt.NDArray[np.int32]]:
        """Write admissions and growth into the host's tables; (flat indices, blocks) for the device's."""
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
        """The step's tokens, and which slices' only token is the row's latest sample, which the host may not know yet."""
        token_ids = np.zeros(slices.first[-1], np.int64)
        unknown = slices.starts >= self._num_known[slices.rows]
        from_device = np.flatnonzero(unknown)
        for i in np.flatnonzero(~unknown).tolist():
            start, num = int(slices.starts[i]), int(slices.nums[i])
            begin = slices.first[i]
            token_ids[begin : begin + num] = self.tokens[slices.rows[i]][start : start + num]
        return token_ids, from_device
