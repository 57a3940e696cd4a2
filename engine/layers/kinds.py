"""Settings of the rotary and routing layers, as frozen values. Torch-free; the family's config parser fills them in."""

from __future__ import annotations

from typing import Literal

import msgspec

RopeScaling = Literal["default", "linear", "llama3", "yarn"]
TopkMethod = Literal["greedy", "group_limited_greedy", "noaux_tc"]


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the rotary embedding over `dim` numbers of a head. Comments name the scalings that read a field.

    Grouped-query attention rotates the first `dim` numbers of a head, and latent attention the last.
    """

    theta: float
    dim: int
    scaling: RopeScaling = "default"
    interleaved: bool = False  # rotated pairs are (0, 1), (2, 3), ... instead of (0, dim / 2), (1, dim / 2 + 1), ...
    factor: float = 1.0
    original_max_len: int = 0  # llama3, yarn: context length in tokens before it was stretched
    low_freq_factor: float = 1.0  # read by llama3 scaling
    high_freq_factor: float = 4.0  # read by llama3 scaling
    beta_fast: float = 32.0  # read by yarn scaling
    beta_slow: float = 1.0  # read by yarn scaling
    truncate: bool = True  # yarn: round both ends of the ramp to whole dimensions
    magnitude: float = 1.0  # yarn: cos and sin are multiplied by this factor
    query_beta: float = 0.0  # queries grow with log(1 + position // original_max_len) by this factor; 0: they do not


class RoutingSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How the router picks `top_k` of `num_experts` for a token. `method` is one of:

    greedy                Scores are a softmax. The router picks the top_k experts with the highest scores.
    group_limited_greedy  Scores are a softmax. The router picks within the best `topk_group` of `n_group` groups, where a group's
                          score is that of its best expert.
    noaux_tc              Scores are a sigmoid, and a learnt bias is added for the choice only. The router picks within the best
                          groups, where a group's score is the sum of its best two experts.
    """

    num_experts: int
    top_k: int
    method: TopkMethod = "greedy"
    n_group: int = 1
    topk_group: int = 1
    normalize: bool = False  # scale the chosen weights so that they sum to one
    scale: float = 1.0  # factor applied to the chosen weights, after `normalize`
