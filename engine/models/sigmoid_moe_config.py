"""Reads the keys of a mixture of experts like DeepSeek-V3's: sigmoid scores, a bias of the choice, shared experts. Torch-free."""

from __future__ import annotations

from engine.layers.kinds import RoutingSpec
from engine.models import config_common as common
from engine.models.config_reader import ConfigReader
from engine.models.spec import MoeSpec


def sigmoid_moe(c: ConfigReader, layers: tuple[int, ...]) -> MoeSpec:
    """Read the experts of the layers `layers`. Raises CheckpointError, naming the key."""
    c.must_be("scoring_func", "sigmoid", "the router's scores are a sigmoid in this architecture")
    c.must_be("topk_method", "noaux_tc", "the router's choice has a bias in this architecture")
    routing = RoutingSpec(
        num_experts=c.integer("n_routed_experts", high=common.MAX_EXPERTS),
        top_k=c.integer("num_experts_per_tok"),
        method="noaux_tc",
        n_group=c.integer("n_group"),
        topk_group=c.integer("topk_group"),
        normalize=c.flag("norm_topk_prob"),
        scale=c.number("routed_scaling_factor"),
    )
    common.check_routing(c, routing)
    size = c.integer("moe_intermediate_size")
    return MoeSpec(
        routing=routing,
        intermediate_size=size,
        shared_size=size * shared_experts(c),
        layers=layers,
        float32_router=True,
    )


def shared_experts(c: ConfigReader) -> int:
    return c.integer("n_shared_experts", 0, low=0, high=common.MAX_EXPERTS)


def layers_with_experts(c: ConfigReader) -> tuple[int, ...]:
    """List the layers with experts: all but the first `first_k_dense_replace`, and of those each `moe_layer_freq`-th."""
    first, step = c.integer("first_k_dense_replace", low=0), c.integer("moe_layer_freq", 1)
    return tuple(i for i in range(common.num_layers(c)) if i >= first and i % step == 0)
