"""What restricted rows keep on the device: their allowed tokens, and their bad words with the latest output tokens.

The latest tokens must be on the device, since a step may be submitted before the tokens of the step before it reach the host.
Only rows with a restriction take a slot of its tensor, which doubles when its slots run out.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from engine.batch import Upload
from engine.plan import AdmittedRow
from engine.request import MAX_BAD_WORD_TOKENS
from engine.sampling.rows import Ints

_HISTORY = MAX_BAD_WORD_TOKENS - 1  # latest output tokens of a row: what can stand before the last token of a bad word
_ANY = -2  # in place of a token before a word's first one: every token matches
_NONE = -3  # in place of a token before the output's first one: it matches no token of a word


class SlotTensor:
    """A tensor `data` [slots, width]. Batch rows take slots of it and free them."""

    def __init__(self, max_rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.data = torch.zeros(0, width, dtype=dtype, device=device)
        self._max_rows = max_rows
        self._slots: dict[int, int] = {}  # maps a batch row to its slot
        self._free: list[int] = []

    def take(self, row: int) -> int:
        """Return a slot for `row`, which must have none."""
        if not self._free:
            old = self.data.shape[0]
            new = min(max(1, 2 * old), self._max_rows)
            self.data = torch.cat([self.data, self.data.new_zeros(new - old, self.data.shape[1])])
            self._free.extend(range(old, new))
        slot = self._slots[row] = self._free.pop()
        return slot

    def release(self, row: int) -> None:
        """Free the slot of `row`, if it has one."""
        if (slot := self._slots.pop(row, None)) is not None:
            self._free.append(slot)

    def find(self, rows: Ints) -> tuple[Ints, Ints]:
        """Return the indices of those of `rows` that have a slot, and their slots."""
        found = [(i, self._slots[row]) for i, row in enumerate(rows.tolist()) if row in self._slots] if self._slots else []
        which, slots = np.array(found, np.int64).reshape(-1, 2).T
        return np.ascontiguousarray(which), np.ascontiguousarray(slots)


class AllowedTokens:
    def __init__(self, max_rows: int, vocab_size: int, device: torch.device, upload: Upload) -> None:
        self._upload = upload
        self._allowed = SlotTensor(max_rows, vocab_size, torch.bool, device)

    def admit(self, admitted: AdmittedRow) -> None:
        """Replace the state of the admitted row by the allowed tokens of its new request, if that has any."""
        self._allowed.release(admitted.row)
        if admitted.params.allowed_token_ids is not None:
            slot = self._allowed.take(admitted.row)
            (ids,) = self._upload([np.array(admitted.params.allowed_token_ids, np.int64)])
            self._allowed.data[slot].zero_().index_fill_(0, ids, True)

    def exclude_others(self, logits: torch.Tensor, rows: Ints) -> None:
        """Add -inf to the logit of every token that is not allowed, in the rows of logits [S, V] that allow only some.

        -inf is added, so that NaN and +inf do not become -inf.
        """
        which, slots = self._allowed.find(rows)
        if which.size:
            index, slot = self._upload([which, slots])
            logits.index_add_(0, index, torch.where(self._allowed.data[slot], 0.0, -torch.inf).to(logits.dtype))


class _Words(NamedTuple):
    """The W bad words of a row, on the device."""

    before: torch.Tensor  # [W, tokens of the longest word - 1] int64: the tokens before the last one, right-aligned after _ANY
    last: torch.Tensor  # [W] int64: the last token of each word


class BadWords:
    def __init__(self, max_rows: int, vocab_size: int, device: torch.device, upload: Upload) -> None:
        self._words: dict[int, _Words] = {}  # by batch row
        self._vocab_size = vocab_size
        self._upload = upload
        self._latest = SlotTensor(max_rows, _HISTORY, torch.int64, device)  # the latest output tokens, newest last

    def admit(self, admitted: AdmittedRow) -> None:
        """Replace the state of the admitted row by the bad words of its new request and the output tokens that it has."""
        self._latest.release(admitted.row)
        self._words.pop(admitted.row, None)
        words = admitted.params.bad_words
        if not words:
            return
        width = max(map(len, words)) - 1
        before = np.array([[_ANY] * (width + 1 - len(word)) + list(word[:-1]) for word in words], np.int64)
        outputs = list(admitted.tokens[admitted.num_prompt :][-_HISTORY:])
        latest = np.array([_NONE] * (_HISTORY - len(outputs)) + outputs, np.int64)
        on_device = self._upload([before.reshape(-1), np.array([word[-1] for word in words], np.int64), latest])
        slot = self._latest.take(admitted.row)  # may replace the tensor
        self._latest.data[slot] = on_device[2]
        self._words[admitted.row] = _Words(on_device[0].view(len(words), width), on_device[1])

    def exclude(self, logits: torch.Tensor, rows: Ints) -> None:
        """Add -inf to the logit of each token that would complete a bad word, in logits [S, V] of `rows`."""
        which, slots = self._latest.find(rows)
        if not which.size:
            return
        words = [self._words[row] for row in rows[which].tolist()]
        nums = [len(w.last) for w in words]
        slot, starts = self._upload([np.repeat(slots, nums), np.repeat(which * self._vocab_size, nums)])
        width = max(w.before.shape[1] for w in words)
        before = torch.cat([torch.nn.functional.pad(w.before, (width - w.before.shape[1], 0), value=_ANY) for w in words])
        completes = ((before == self._latest.data[slot, _HISTORY - width :]) | (before == _ANY)).all(-1)
        places = starts + torch.cat([w.last for w in words])
        logits.view(-1).index_add_(0, places, torch.where(completes, -torch.inf, 0.0).to(logits.dtype))

    def add(self, rows: Ints, tokens: torch.Tensor) -> None:
        """Append the sampled tokens [S] of `rows` to the latest tokens of those that have bad words."""
        which, slots = self._latest.find(rows)
        if which.size:
            index, slot = self._upload([which, slots])
            self._latest.data[slot] = torch.cat([self._latest.data[slot, 1:], tokens[index][:, None]], dim=1)
