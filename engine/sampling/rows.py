"""The sampler's state of each batch row: the row's parameters on the host, and its token counts on the device.

Only rows with penalties have token counts. Such a row gets a slot in the count tensors when it is admitted. The count tensors
double when the slots run out. A server that never sees a penalty spends no memory on counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import Upload
from engine.plan import AdmittedRow
from engine.sampling.choose import COLUMNS, LOWEST_TEMPERATURE

Ints = npt.NDArray[np.int64]

_RECORD = np.dtype(
    [
        ("seed", np.uint64),
        ("num_prompt", np.int64),
        ("min_tokens", np.int64),
        *((name, np.float64) for name in COLUMNS),
        ("repetition", np.float64),
        ("presence", np.float64),
        ("frequency", np.float64),
        ("plain", np.bool_),  # the token is sampled from the unadjusted logits, and no log-probabilities are reported
        ("penalised", np.bool_),
        ("biased", np.bool_),
        ("restricted", np.bool_),  # allowed_token_ids, bad_words or min_tokens exclude tokens
        ("wants_logprobs", np.bool_),
        ("logprobs", np.int64),
        ("wants_prompt_logprobs", np.bool_),
        ("prompt_logprobs", np.int64),
    ],
    align=True,
)


class TokenBias(NamedTuple):
    """The logit_bias of a batch row: token ids, and the number that is added to the logit of each."""

    ids: Ints
    values: npt.NDArray[np.float32]


class RowParams:
    """The sampling parameters of every batch row, on the host. `table` has one record per row; lists hold tokens of each row."""

    def __init__(self, max_rows: int, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self.table: npt.NDArray[Any] = np.zeros(max_rows, _RECORD)
        self.stop_ids: list[Ints] = [np.zeros(0, np.int64)] * max_rows
        self.bias: list[TokenBias] = [TokenBias(np.zeros(0, np.int64), np.zeros(0, np.float32))] * max_rows
        self._vocab_size = vocab_size
        self._eos = tuple(eos_token_ids)

    def admit(self, admitted: AdmittedRow) -> None:
        """Replace a batch row's parameters by those of the newly admitted request."""
        p, row = admitted.params, admitted.row
        columns = {name: getattr(p, name) for name in COLUMNS}
        columns["top_k"] = min(p.top_k, self._vocab_size) if p.top_k > 0 else self._vocab_size
        columns["temperature"] = max(p.temperature, LOWEST_TEMPERATURE) if p.temperature else 0.0
        self.table[row] = (
            admitted.seed,
            admitted.num_prompt,
            p.min_tokens,
            *columns.values(),
            p.repetition_penalty,
            p.presence_penalty,
            p.frequency_penalty,
            not (p.has_penalties or p.logit_bias or p.logprobs is not None or p.bad_words or p.allowed_token_ids),
            p.has_penalties,
            bool(p.logit_bias),
            p.is_restricted,
            p.logprobs is not None,
            p.logprobs or 0,
            p.prompt_logprobs is not None,
            p.prompt_logprobs or 0,
        )
        stop = {*p.stop_token_ids, *p.end_ids(self._eos)}
        # A stop id outside the vocabulary is never sampled, so there is nothing to mask.
        self.stop_ids[row] = np.array(sorted(t for t in stop if 0 <= t < self._vocab_size), np.int64)
        bias = p.logit_bias or {}
        self.bias[row] = TokenBias(np.array(list(bias), np.int64), np.array(list(bias.values()), np.float32))


class TokenCounts:
    """Token counts of each row with penalties: which tokens its prompt has, and how often each token was generated."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device, upload: Upload) -> None:
        self._slots: dict[int, int] = {}  # maps a batch row to its slot
        self._free: list[int] = []
        self._max_rows = max_rows
        self._upload = upload
        self._in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)  # [slots, V]: token occurs
        self._generated = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)  # [slots, V]: times generated

    def admit(self, admitted: AdmittedRow) -> None:
        """Free the slot of the row's previous request. If the new request has penalties, take a slot and count its tokens."""
        if (old := self._slots.pop(admitted.row, None)) is not None:
            self._free.append(old)
        if not admitted.params.has_penalties:
            return
        if not self._free:
            self._grow()
        slot = self._slots[admitted.row] = self._free.pop()
        prompt = np.unique(np.array(admitted.tokens[: admitted.num_prompt], np.int64))
        outputs, counts = np.unique(np.array(admitted.tokens[admitted.num_prompt :], np.int64), return_counts=True)
        on_device = self._upload([prompt, outputs, counts.astype(np.int32)])
        self._in_prompt[slot].zero_().index_fill_(0, on_device[0], True)
        self._generated[slot].zero_().index_copy_(0, on_device[1], on_device[2])

    def slots(self, rows: Ints) -> Ints:
        """Return the slots of `rows` in the count tensors. All of the rows must have penalties."""
        return np.array([self._slots[row] for row in rows.tolist()], np.int64)

    def read(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (whether the prompt has a token [N, V] bool, how often it was generated [N, V] int32) for slots [N]."""
        return self._in_prompt[slots], self._generated[slots]

    def add(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Count that token tokens[i], a valid token id, was generated once more in slot slots[i]."""
        self._generated[slots, tokens] += 1  # each row samples once per step, so the indices have no duplicates

    def _grow(self) -> None:
        old = self._in_prompt.shape[0]
        new = min(max(1, 2 * old), self._max_rows)
        self._in_prompt = torch.cat([self._in_prompt, self._in_prompt.new_zeros(new - old, self._in_prompt.shape[1])])
        self._generated = torch.cat([self._generated, self._generated.new_zeros(new - old, self._generated.shape[1])])
        self._free.extend(range(old, new))
