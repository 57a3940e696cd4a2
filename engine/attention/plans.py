"""Plans: the kernels that cuDNN has planned in this process, each for one combination of shapes and strides.

A plan takes 65 to 90 ms (`cudnn.py`). A server makes the usual ones ahead, and its steps use no others, so no request waits. This
module needs no Triton, unlike those that call cuDNN.
"""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple


class Plan(NamedTuple):
    """A combination of shapes and strides that cuDNN plans a kernel for. Heads and dtype are those of the model."""

    rows: int  # queries of each sequence
    keys: int  # keys of each sequence; as many as rows if causal
    causal: bool
    sequences: int = 1
    padded: bool = True  # whether the sequences were padded, which changes strides
    with_lse: bool = True  # whether the log-sum-exps are returned


class Plans:
    """The plans that cuDNN has made in this process for one model. `on_demand` allows a step to wait for a new plan."""

    def __init__(self) -> None:
        self.on_demand = True
        self._made: set[Plan] = set()

    def take(self, needed: Set[Plan]) -> bool:
        """Whether a step may use cuDNN with the plans `needed`: they exist, or they may be made now. A call that gets True must
        use all of them."""
        if not needed <= self._made and not self.on_demand:
            return False
        self._made |= needed
        return True
