"""The torch backend: it runs the forward pass of a model of `engine.models`."""

from __future__ import annotations

import logging

import torch

from engine.attention import select
from engine.batch import ForwardBatch, PoolSpec, WarmupChunk
from engine.config import EngineConfig
from engine.models import registry
from engine.models.spec import ModelSpec
from engine.startup import Progress, no_report
from engine.weights import capacity, dummy, loader

log = logging.getLogger("tidegate.engine")


class TorchBackend:
    def __init__(self, model: registry.Model) -> None:
        self._model = model
        self._plans_allowed = True

    @property
    def graphable(self) -> bool:
        return self._model.graphable

    @property
    def graph_tokens(self) -> int:
        return self._model.graph_tokens

    def warmup_chunks(self, max_tokens: int, max_len: int) -> list[WarmupChunk]:
        return self._model.attention.warmup_chunks(max_tokens, max_len, self._model.dtype)

    def kv_pools(self) -> list[list[PoolSpec]]:
        return self._model.kv_pools()

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        return self._model.forward(batch)

    def rehearse(self, batch: ForwardBatch) -> torch.Tensor:
        self._model.attention.allow_plans(True)
        try:
            return self._model.forward(batch, self._model.distinct_layers())
        finally:
            self._model.attention.allow_plans(self._plans_allowed)

    def allow_plans(self, allowed: bool) -> None:
        self._plans_allowed = allowed
        self._model.attention.allow_plans(allowed)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return self._model.logits(hidden, out)

    def close(self) -> None:
        """Do nothing, since the garbage collector frees the model."""


def plan(spec: ModelSpec, config: EngineConfig) -> TorchBackend:
    """Build the model of `spec` on the device "meta", where its steps compute nothing and launch the kernels of a GPU."""
    device = torch.device("meta")
    model = registry.build(spec, dtype=getattr(torch, config.dtype), device=device)
    model.attention = select.choose(device, model.kv_pools()[0], config.cache.block_size)
    return TorchBackend(model)


def load(spec: ModelSpec, config: EngineConfig, device: torch.device, progress: Progress = no_report) -> TorchBackend:
    """Build the model of `spec` on `device`, and load the weights of the checkpoint `config.model`.

    If `load_format` is "dummy", the weights are random. Raises CheckpointError if the weights do not fit or cannot be read.
    """
    for note in spec.notes:
        log.warning(note)
    dtype: torch.dtype = getattr(torch, config.dtype)
    capacity.check(spec, dtype=dtype, device=device)
    with torch.inference_mode():
        model = registry.build(spec, dtype=dtype, device=device)
        model.attention = select.choose(device, model.kv_pools()[0], config.cache.block_size)
        if config.load_format == "dummy":
            dummy.fill(model, seed=config.seed, progress=progress)
        else:
            loader.load(model, config.model, progress)
    return TorchBackend(model)
