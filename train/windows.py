"""Chooses the tokens of each training step from the seed and the step number alone, so a resumed run sees the same tokens."""

from __future__ import annotations

import torch


class Windows:
    """Cuts a stream of token ids into windows of `length` tokens, each with `ahead` more tokens that are only predicted.

    Each epoch goes through all windows in another order, and cuts the stream at another offset.
    """

    def __init__(self, stream: torch.Tensor, *, length: int, ahead: int, seed: int) -> None:
        """`stream` [N] holds any integer type on any device. Raises ValueError if it is shorter than two windows."""
        self.num = (len(stream) - ahead) // length - 1  # the last window is left out, so that every offset gives as many windows
        if self.num < 1:
            raise ValueError(f"{len(stream)} tokens are too few for windows of {length}: there must be at least two windows")
        self.stream, self.length, self.seed = stream, length, seed
        self.within = torch.arange(length + ahead, device=stream.device)
        self._epoch: tuple[int, torch.Tensor] | None = None

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Return `count` windows of the endless sequence of windows, from number `first` on -> [count, length + ahead] int64."""
        starts = []
        while count > 0:
            epoch, at = divmod(first, self.num)
            starts.append(self._starts(epoch)[at : at + count])
            first, count = first + len(starts[-1]), count - len(starts[-1])
        return self.stream[torch.cat(starts).unsqueeze(1) + self.within].long()

    def _starts(self, epoch: int) -> torch.Tensor:
        if self._epoch is None or self._epoch[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed << 40) + (self.length << 20) + epoch)
            offset = int(torch.randint(self.length, (1,), generator=generator))
            order = torch.randperm(self.num, generator=generator) * self.length + offset
            self._epoch = epoch, order.to(self.stream.device)
        return self._epoch[1]
