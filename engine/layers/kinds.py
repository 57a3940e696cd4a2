"""What the rotary and routing layers need to know of a model, as frozen values. Torch-free: `models/spec.py` fills them in."""

from __future__ import annotations

from typing import Literal

import msgspec

RopeScaling = Literal["default", "linear", "llama3", "yarn"]
TopkMethod = Literal["greedy", "group_limited_greedy", "noaux_tc"]


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary embedding over the last `dim` numbers of a head. Fields after `factor` belong to the scaling that names them."""

    theta: float
    dim: int
    scaling: RopeScaling = "default"
    interleaved: bool = False  # pairs are (0, 1), (2, 3), ... instead of (0, dim / 2), (1, dim / 2 + 1), ...
    factor: float = 1.0
    original_max_len: int = 0  # llama3, yarn: context before it was stretched
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions
    magnitude: float = 1.0  # yarn: cos and sin are multiplied by it


class RoutingSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How a token picks `top_k` of `num_experts`.

    greedy                softmax, the best top_k
    group_limited_greedy  softmax, the best top_k within the best `topk_group` of `n_group` groups (a group counts as its best)
    noaux_tc              sigmoid plus a learnt bias to choose by, groups count as the sum of their best two
    """

    num_experts: int
    top_k: int
    method: TopkMethod = "greedy"
    n_group: int = 1
    topk_group: int = 1
    normalize: bool = False  # the chosen weights sum to one
    scale: float = 1.0  # after that
