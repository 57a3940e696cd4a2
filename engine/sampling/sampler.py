"""The sampler: logits of the step's sampling rows in, one token a row out, all rows at once.

The order for each row, from the model's logits:

    1  repetition penalty (over prompt and output), then frequency and presence penalties (over the output)
    2  logit_bias
    3  stop tokens forbidden until min_tokens are out
    4  temperature 0: the largest. Otherwise temperature, then top_k, top_p and min_p, then one draw (choose.py)

`reference.py` does the same one row at a time, plainly. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engine.plan import AdmittedRow
from engine.sampling.choose import COLUMNS, Choice, choose
from engine.sampling.draw_rows import DrawRows
from engine.sampling.logprobs import LogprobTensors, log_probabilities
from engine.sampling.rows import Ints, RowParams, TokenCounts, Upload
from engine.sampling.uniform import uniforms


class Sampled(NamedTuple):
    tokens: torch.Tensor  # [S] int64
    logprobs: LogprobTensors | None  # of those of the S rows that asked, in order
    logprob_rows: Ints  # which of the S those are
    num_top: list[int]  # how many alternatives each of those asked for


class Sampler:
    def __init__(
        self, *, max_rows: int, vocab_size: int, eos_token_ids: Sequence[int], device: torch.device, upload: Upload
    ) -> None:
        self.params = RowParams(max_rows, vocab_size, eos_token_ids)
        self._counts = TokenCounts(max_rows, vocab_size, device, upload)
        self._vocab_size = vocab_size
        self._upload = upload
        self._on_device = DrawRows(max_rows, device, upload) if device.type == "cuda" else None

    @property
    def on_device(self) -> DrawRows:
        """How rows choose, for the kernels; on CUDA alone."""
        assert self._on_device is not None
        return self._on_device

    def admit(self, admitted: Sequence[AdmittedRow]) -> None:
        """Forget the rows' last owners and learn the new ones' parameters, seeds and tokens so far."""
        for a in admitted:
            self.params.admit(a)
            self._counts.admit(a)
        if admitted and self._on_device is not None:
            self._on_device.admit(self.params, np.array([a.row for a in admitted], np.int64))

    def is_plain(self, rows: Ints, ends: Ints) -> bool:
        """Whether `sample` chooses from the logits as they are for each of these, and reports nothing."""
        records = self.params.table[rows]
        return bool(np.all(records["plain"] & (ends - records["num_prompt"] >= records["min_tokens"])))

    def uniforms(self, rows: Ints, ends: Ints) -> npt.NDArray[np.float64]:
        """The random number of each row for the token at its end; zeros where nobody draws."""
        records = self.params.table[rows]
        return uniforms(records["seed"], ends) if records["temperature"].any() else np.zeros(rows.size)

    def sample(self, logits: torch.Tensor, rows: Ints, ends: Ints) -> Sampled:
        """Choose the token at position `ends[i]` of row `rows[i]` from `logits[i]`; `logits` [S, V] may be overwritten."""
        records = self.params.table[rows]
        if self.is_plain(rows, ends):
            return Sampled(self._choose(logits, rows, records, ends), None, np.zeros(0, np.int64), [])
        logits = logits.float()
        wanting = np.flatnonzero(records["wants_logprobs"])
        plain = logits[self._upload([wanting])[0]].log_softmax(-1) if wanting.size else None
        penalised = self._penalise(logits, rows, records)
        self._bias(logits, rows, records)
        self._forbid_stops(logits, rows, records, ends)
        tokens = self._choose(logits, rows, records, ends)
        if penalised is not None:
            self._counts.add(penalised.slots, tokens[penalised.indices])
        num_top = records["logprobs"][wanting].tolist()
        reported = None
        if plain is not None:
            reported = log_probabilities(plain, tokens[self._upload([wanting])[0]], max(num_top))
        return Sampled(tokens, reported, wanting, num_top)

    def _penalise(self, logits: torch.Tensor, rows: Ints, records: npt.NDArray[Any]) -> _Penalised | None:
        which = np.flatnonzero(records["penalised"])
        if not which.size:
            return None
        factors = [records[name][which].astype(np.float32) for name in ("repetition", "frequency", "presence")]
        indices, slots, *columns = self._upload([which, self._counts.slots(rows[which]), *factors])
        repetition, frequency, presence = (column[:, None] for column in columns)  # each [N, 1]
        in_prompt, generated = self._counts.read(slots)  # [N, V]
        some = logits[indices]
        seen = in_prompt | (generated > 0)
        some = torch.where(seen, torch.where(some > 0, some / repetition, some * repetition), some)
        some -= frequency * generated + presence * (generated > 0)
        logits.index_copy_(0, indices, some)
        return _Penalised(indices, slots)

    def _bias(self, logits: torch.Tensor, rows: Ints, records: npt.NDArray[Any]) -> None:
        which = np.flatnonzero(records["biased"])
        if not which.size:
            return
        biases = [self.params.bias[row] for row in rows[which].tolist()]
        index = np.repeat(which, [b.ids.size for b in biases])
        i, token, value = self._upload(
            [index, np.concatenate([b.ids for b in biases]), np.concatenate([b.values for b in biases])]
        )
        logits[i, token] += value

    def _forbid_stops(self, logits: torch.Tensor, rows: Ints, records: npt.NDArray[Any], ends: Ints) -> None:
        which = np.flatnonzero(ends - records["num_prompt"] < records["min_tokens"])
        if not which.size:
            return
        stops = [self.params.stop_ids[row] for row in rows[which].tolist()]
        i, token = self._upload([np.repeat(which, [s.size for s in stops]), np.concatenate(stops)])
        logits.view(-1).index_fill_(0, i * self._vocab_size + token, float("-inf"))

    def _choose(self, logits: torch.Tensor, rows: Ints, records: npt.NDArray[Any], ends: Ints) -> torch.Tensor:
        drawn = np.flatnonzero(records["temperature"] > 0.0)
        if not drawn.size:
            # What has been penalised is float32, for which a kernel of ours would be compiled now. That of a model's own type is.
            if self._on_device is None or logits.dtype == torch.float32:
                return logits.argmax(-1)
            return self._on_device.likeliest(logits, *self._upload([rows.astype(np.int32)]))
        if self._on_device is not None:
            return self._on_device.draw(logits, *self._upload([rows.astype(np.int32), self.uniforms(rows, ends)]))
        some, r = logits.float(), records[drawn]
        columns = [r[name] for name in COLUMNS]
        sorting = np.flatnonzero((r["top_k"] < self._vocab_size) | (r["top_p"] < 1.0))
        uniform = uniforms(r["seed"], ends[drawn])
        index, sorted_rows, *choice = self._upload([drawn, sorting, uniform, *(np.ascontiguousarray(c) for c in columns)])
        everyone = drawn.size == len(records)
        if not everyone:
            some = some[index]
        max_top_k = int(r["top_k"][sorting].max()) if sorting.size else 0
        chosen = choose(some, Choice(*choice), sorted_rows if sorting.size else None, max_top_k)
        return chosen if everyone else logits.argmax(-1).index_copy_(0, index, chosen)


class _Penalised(NamedTuple):
    indices: torch.Tensor  # into the step's sampling rows
    slots: torch.Tensor  # of their counts
