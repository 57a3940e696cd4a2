"""Reports torch's devices, and whether an engine config would start. `tidegate doctor` runs this module.

The module runs in a process of its own, `python -m engine.weights.probe CONFIG`, since importing torch takes seconds and a broken
CUDA installation can end the process. CONFIG is an EngineConfig as JSON; if it is empty, only torch is examined. The result is
one JSON object on standard output. No weight is read: the model is built on the meta device, and only file headers are read.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import torch

from engine.batch import block_bytes
from engine.config import EngineConfig, fit_cache, resolve
from engine.errors import ConfigError, TidegateError
from engine.models import registry
from engine.models.families import read_spec
from engine.weights import capacity, loader


def torch_facts() -> dict[str, Any]:
    num = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [torch.cuda.get_device_properties(i) for i in range(num)]
    devices = [{"name": d.name, "bytes": d.total_memory, "capability": f"{d.major}.{d.minor}"} for d in found]
    return {"version": str(torch.__version__), "cuda": torch.version.cuda, "devices": devices}


def problem_with(asked: EngineConfig) -> str | None:
    """Return why an engine with this config would not start, or None if it would. No weight is read."""
    try:
        spec = read_spec(asked.model)
        config = resolve(asked, spec.limits(), has_cuda=torch.cuda.is_available())
        dtype: torch.dtype = getattr(torch, config.dtype)
        capacity.check(spec, dtype=dtype, device=torch.device(config.device))
        model = registry.build(spec, dtype=dtype, device=torch.device("meta"))
        if config.load_format == "safetensors":
            loader.verify(model, config.model)
        _check_cache(config, model, asked=asked.max_model_len)
    except TidegateError as error:
        return error.message
    return None


def _check_cache(config: EngineConfig, model: registry.Model, *, asked: int | None) -> None:
    """Raise ConfigError if the KV cache cannot hold the context. On CUDA the cache's size is unknown until an engine starts."""
    cache = config.cache
    each = block_bytes(model.kv_pools(), cache.block_size)
    num_blocks = cache.num_blocks or (cache.host_bytes // each if config.device == "cpu" else None)
    if num_blocks == 0:
        raise ConfigError(f"host_bytes is {cache.host_bytes}, but one block of the KV cache has {each}", param="host_bytes")
    if num_blocks is not None:
        fit_cache(config, num_blocks, asked=asked, spill_bytes=each)


def main() -> None:
    text = sys.argv[1]
    problem = problem_with(msgspec.json.decode(text, type=EngineConfig)) if text else None
    sys.stdout.write(msgspec.json.encode({**torch_facts(), "problem": problem}).decode() + "\n")


if __name__ == "__main__":
    main()
