"""CudaSampler: samples with Triton kernels that a CUDA graph can hold. `sampling/choose.py` is the plain twin."""

from __future__ import annotations

import importlib

import numpy as np
import torch

from engine.batch import Upload
from engine.sampling.choose import COLUMNS
from engine.sampling.rows import Ints, RowParams


class CudaSampler:
    """Keeps the sampling parameters of each batch row on the device, where the sampling kernels read them.

    The last row is the scratch row, which pads batches; its temperature stays 0. Nothing here waits for the device.
    """

    def __init__(self, max_rows: int, device: torch.device, upload: Upload) -> None:
        self._upload = upload
        num = max_rows + 1
        # Each column begins on a multiple of 16 bytes.
        self._columns = torch.zeros(len(COLUMNS), num + num % 2, dtype=torch.float64, device=device)
        # The kernels write each row's token to an array of latest tokens. For steps outside of graphs, nothing reads this array.
        self._unused_latest = torch.zeros(num, dtype=torch.int64, device=device)
        # Imported by name, since this module must also import on machines without Triton.
        self._argmax = importlib.import_module("engine.kernels.argmax").argmax_tokens
        kernels = importlib.import_module("engine.kernels.sample_filtered")
        self._replace_argmax, self._params = kernels.sample_filtered, kernels.SampleParams(*self._columns)

    def admit(self, params: RowParams, rows: Ints) -> None:
        """Copy the sampling parameters of `rows` to the device."""
        values = np.stack([params.table[name][rows] for name in COLUMNS])
        on_device = self._upload([rows, values])
        self._columns.index_copy_(1, on_device[0], on_device[1])

    def sample(self, logits: torch.Tensor, rows: torch.Tensor, latest: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Sample a token for each of `rows` [B] int32 from logits [B, V] and uniform [B] float64 in [0, 1).

        Returns tokens [B] int64. A row without a finite largest logit gets NO_TOKEN. Each token is also written to latest[row],
        int64, where such a row gets token 0.
        """
        tokens: torch.Tensor = self._argmax(logits, rows, latest)
        self._replace_argmax(logits, rows, latest, tokens, uniform, self._params)
        return tokens

    def sample_eagerly(self, logits: torch.Tensor, rows: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Sample as `sample` does, for a step outside of a CUDA graph: the runner itself writes the rows' latest tokens."""
        return self.sample(logits, rows, self._unused_latest, uniform)

    def argmax(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Find the argmax token of each of `rows` [B] int32 from logits [B, V] -> [B] int64, or NO_TOKEN for a failed row.

        torch's argmax would wait for the device at its first call, when torch loads its kernel.
        """
        tokens: torch.Tensor = self._argmax(logits, rows, self._unused_latest)
        return tokens
