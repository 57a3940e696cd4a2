"""On CUDA: how each batch row chooses its tokens, kept on the device for `kernels/sample_filtered.py`, which a graph can hold."""

from __future__ import annotations

import importlib

import numpy as np
import torch

from engine.sampling.choose import COLUMNS
from engine.sampling.rows import Ints, RowParams, Upload


class DrawRows:
    """The last row is nobody's, and draws nothing: batches are padded with it."""

    def __init__(self, max_rows: int, device: torch.device, upload: Upload) -> None:
        self._upload = upload
        num = max_rows + 1
        self._columns = torch.zeros(len(COLUMNS), num + num % 2, dtype=torch.float64, device=device)  # each begins on 16 bytes
        self._no_latest = torch.zeros(
            num, dtype=torch.int64, device=device
        )  # where the kernel's copy of the tokens is not wanted
        # Not at the top: what is imported there runs without Triton too.
        self._choose_likeliest = importlib.import_module("engine.kernels.argmax").argmax_tokens
        kernels = importlib.import_module("engine.kernels.sample_filtered")
        self._draw, self._params = kernels.sample_filtered, kernels.SampleParams(*self._columns)

    def admit(self, params: RowParams, rows: Ints) -> None:
        values = np.stack([params.table[name][rows] for name in COLUMNS])
        on_device = self._upload([rows, values])
        self._columns.index_copy_(1, on_device[0], on_device[1])

    def choose(self, logits: torch.Tensor, rows: torch.Tensor, latest: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """The token of each of `rows` [B] int32 from logits [B, V] and uniform [B] float64: [B], written to `latest` too."""
        tokens: torch.Tensor = self._choose_likeliest(logits, rows, latest)
        self._draw(logits, rows, latest, tokens, uniform, self._params)
        return tokens

    def likeliest(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Of each of `rows` [B] int32 from logits [B, V]: [B], the first of equals. As the others it waits for nothing, where
        torch's argmax waits for the device when it is first called and its kernel loaded.
        """
        tokens: torch.Tensor = self._choose_likeliest(logits, rows, self._no_latest)
        return tokens

    def draw(self, logits: torch.Tensor, rows: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """The same for a step outside of a graph."""
        return self.choose(logits, rows, self._no_latest, uniform)
