"""The sampler turns the logits of a step's sampling rows into one token per row, all rows at once.

It adjusts and samples the logits of each row in this order:

    1  repetition penalty (over prompt and output), then frequency and presence penalties (over the output)
    2  logit_bias
    3  tokens outside allowed_token_ids, tokens that would complete a bad word and, until min_tokens tokens are generated, stop
       tokens get -inf
    4  temperature 0: argmax. Otherwise temperature, then top_k, top_p and min_p, then one sample (choose.py)

Steps 1 to 3 keep NaN and +inf, so that step 4 gives NO_TOKEN to every row whose logits hold one. A row of which step 3 leaves no
token gets NO_CHOICE. `reference.py` is the plain twin and does one row at a time. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from engine.batch import Upload
from engine.kernels.hardware import is_gpu
from engine.plan import NO_CHOICE, AdmittedRow
from engine.sampling.choose import COLUMNS, Choice, argmax, choose
from engine.sampling.cuda_sampler import CudaSampler
from engine.sampling.logprobs import LogprobTensors, log_probabilities
from engine.sampling.restrictions import AllowedTokens, BadWords
from engine.sampling.rows import Ints, RowParams, TokenCounts
from engine.sampling.uniform import uniforms


class Sampled(NamedTuple):
    """The sampled tokens of S rows, and log-probabilities for the L of these rows that request some."""

    tokens: torch.Tensor  # [S] int64: token ids, NO_TOKEN or NO_CHOICE
    latest: torch.Tensor  # [S] int64: the tokens, with 0 in place of those two, which the model can take as input
    logprobs: LogprobTensors | None  # the log-probabilities at L positions; None if L is 0
    logprob_rows: Ints  # [L]: indices of the rows with log-probabilities, among the S rows
    num_top: list[int]  # [L]: alternatives that each of these rows requests


class Sampler:
    def __init__(
        self, *, max_rows: int, vocab_size: int, eos_token_ids: Sequence[int], device: torch.device, upload: Upload
    ) -> None:
        self.params = RowParams(max_rows, vocab_size, eos_token_ids)
        self._counts = TokenCounts(max_rows, vocab_size, device, upload)
        self._allowed = AllowedTokens(max_rows, vocab_size, device, upload)
        self._bad_words = BadWords(max_rows, vocab_size, device, upload)
        self._vocab_size = vocab_size
        self._upload = upload
        self._cuda = CudaSampler(max_rows, device, upload) if is_gpu(device) else None

    @property
    def cuda(self) -> CudaSampler:
        """The part of the sampler that a CUDA graph can hold. Exists on CUDA only."""
        assert self._cuda is not None
        return self._cuda

    def admit(self, admitted: Sequence[AdmittedRow]) -> None:
        """Replace the state of the admitted rows by the parameters, seeds and tokens of their new requests."""
        for a in admitted:
            self.params.admit(a)
            self._counts.admit(a)
            self._allowed.admit(a)
            self._bad_words.admit(a)
        if admitted and self._cuda is not None:
            self._cuda.admit(self.params, np.array([a.row for a in admitted], np.int64))

    def is_plain(self, rows: Ints, ends: Ints) -> bool:
        """Whether `sample` would adjust no logits of these rows and report no log-probabilities."""
        records = self.params.table[rows]
        return bool(np.all(records["plain"] & (ends - records["num_prompt"] >= records["min_tokens"])))

    def uniforms(self, rows: Ints, ends: Ints) -> npt.NDArray[np.float64]:
        """Compute the random number of each row i for the token at position ends[i]. All are 0 if all temperatures are 0."""
        records = self.params.table[rows]
        return uniforms(records["seed"], ends) if records["temperature"].any() else np.zeros(rows.size)

    def sample(self, logits: torch.Tensor, rows: Ints, ends: Ints) -> Sampled:
        """Sample the token at position `ends[i]` of row `rows[i]` from `logits[i]`; `logits` [S, V] may be overwritten."""
        records = self.params.table[rows]
        if self.is_plain(rows, ends):
            tokens = self._choose(logits, rows, records, ends)
            return Sampled(tokens, tokens.clamp(min=0), None, np.zeros(0, np.int64), [])
        logits = logits.float()
        reporting = np.flatnonzero(records["wants_logprobs"])
        reported = self._upload([reporting])[0] if reporting.size else None
        unadjusted = None if reported is None else logits[reported].log_softmax(-1)
        penalised = self._penalise(logits, rows, records)
        self._bias(logits, rows, records)
        restricted = self._restrict(logits, rows, records, ends)
        tokens = self._choose(logits, rows, records, ends)
        if restricted is not None:
            tokens = restricted.mark_empty(logits, tokens)
        latest = tokens.clamp(min=0)
        if penalised is not None:
            self._counts.add(penalised.slots, latest[penalised.indices])
        if restricted is not None:
            self._bad_words.add(rows, latest)
        num_top = records["logprobs"][reporting].tolist()
        logprobs = None
        if unadjusted is not None:
            logprobs = log_probabilities(unadjusted, latest[reported], max(num_top))
        return Sampled(tokens, latest, logprobs, reporting, num_top)

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

    def _restrict(self, logits: torch.Tensor, rows: Ints, records: npt.NDArray[Any], ends: Ints) -> _Restricted | None:
        """Exclude the tokens that the rows' own fields exclude. Returns None if no row has such fields."""
        which = np.flatnonzero(records["restricted"])
        if not which.size:
            return None
        (indices,) = self._upload([which])
        restricted = _Restricted(indices, logits[indices].amax(-1))
        self._allowed.exclude_others(logits, rows)
        self._bad_words.exclude(logits, rows)
        self._forbid_stops(logits, rows, records, ends)
        return restricted

    def _forbid_stops(self, logits: torch.Tensor, rows: Ints, records: npt.NDArray[Any], ends: Ints) -> None:
        which = np.flatnonzero(ends - records["num_prompt"] < records["min_tokens"])
        if not which.size:
            return
        stops = [self.params.stop_ids[row] for row in rows[which].tolist()]
        places = np.repeat(which, [s.size for s in stops]) * self._vocab_size + np.concatenate(stops)
        index, minus_inf = self._upload([places, np.full(places.size, -np.inf, np.float32)])
        logits.view(-1).index_add_(0, index, minus_inf)  # -inf is added, so that NaN and +inf do not become -inf

    def _choose(self, logits: torch.Tensor, rows: Ints, records: npt.NDArray[Any], ends: Ints) -> torch.Tensor:
        random = np.flatnonzero(records["temperature"] > 0.0)
        if not random.size:
            # Adjusted logits are float32. Our argmax kernel is compiled for the model's own dtype, and would have to be compiled
            # for float32 in the middle of a step.
            if self._cuda is None or logits.dtype == torch.float32:
                return argmax(logits)
            return self._cuda.argmax(logits, *self._upload([rows.astype(np.int32)]))
        if self._cuda is not None:
            return self._cuda.sample_eagerly(logits, *self._upload([rows.astype(np.int32), self.uniforms(rows, ends)]))
        some, r = logits.float(), records[random]
        columns = [r[name] for name in COLUMNS]
        sorting = np.flatnonzero((r["top_k"] < self._vocab_size) | (r["top_p"] < 1.0))
        uniform = uniforms(r["seed"], ends[random])
        index, sorted_rows, *choice = self._upload([random, sorting, uniform, *(np.ascontiguousarray(c) for c in columns)])
        all_random = random.size == len(records)
        if not all_random:
            some = some[index]
        max_top_k = int(r["top_k"][sorting].max()) if sorting.size else 0
        chosen = choose(some, Choice(*choice), sorted_rows if sorting.size else None, max_top_k)
        return chosen if all_random else argmax(logits).index_copy_(0, index, chosen)


class _Penalised(NamedTuple):
    """The P rows of a step that have penalties."""

    indices: torch.Tensor  # [P]: index of each row among the step's sampling rows
    slots: torch.Tensor  # [P]: each row's slot in the count tensors


class _Restricted(NamedTuple):
    """The R rows of a step whose own fields exclude tokens."""

    indices: torch.Tensor  # [R]: index of each row among the step's sampling rows
    largest: torch.Tensor  # [R]: the largest logit of each row before tokens were excluded

    def mark_empty(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return `tokens` with NO_CHOICE in the rows whose logits were finite, and of which no token is left."""
        empty = (logits[self.indices].amax(-1) == -torch.inf) & self.largest.isfinite()
        return tokens.index_copy(0, self.indices, torch.where(empty, NO_CHOICE, tokens[self.indices]))
