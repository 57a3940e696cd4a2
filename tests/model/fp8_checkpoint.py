"""Makes block-scaled FP8 checkpoints from a plain checkpoint or from random numbers, and gives their dequantised weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from engine.models import registry
from engine.models.families import read_spec
from engine.quant import fp8

BLOCK = (128, 128)
E4M3_MAX = 448.0
STORED_AS_FP8 = (
    "_proj.weight",
    "_proj_with_mqa.weight",
    ".w1.weight",
    ".w2.weight",
    ".w3.weight",
)  # the names of FP8 tensors end so


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a matrix [N, M] block by block. Returns e4m3 [N, M] and the scale of each block. This is the slow twin of the
    engine's function."""
    rows, columns = (-(-size // step) for size, step in zip(weight.shape, BLOCK, strict=True))
    out, scales = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for r in range(rows):
        for c in range(columns):
            part = (slice(r * BLOCK[0], (r + 1) * BLOCK[0]), slice(c * BLOCK[1], (c + 1) * BLOCK[1]))
            largest = weight[part].abs().max()
            scales[r, c] = largest / E4M3_MAX if largest > 0 else 1.0
            out[part] = (weight[part] / scales[r, c]).to(torch.float8_e4m3fn)
    return out, scales


def dequantize(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Multiply each element by its block's scale. Unlike the engine's function, this one looks up the scale for each element."""
    rows, columns = (torch.arange(n, device=scales.device) // step for n, step in zip(weight.shape, BLOCK, strict=True))
    return weight.float() * scales[rows][:, columns]


def load_in_transformers(folder: Path, plain: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Dequantise the checkpoint in `folder`, write the result to the folder `plain`, and load it with transformers. Returns
    (model, loading info)."""
    stored, tensors = load_file(folder / "model.safetensors"), {}
    for name, tensor in stored.items():
        if not name.endswith("_scale_inv"):
            scale = stored.get(name + "_scale_inv")
            tensors[name] = tensor.float() if scale is None else dequantize(tensor, scale)
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, output_loading_info=True)


def to_fp8(folder: Path, reference: PreTrainedModel) -> int:
    """Quantise the checkpoint in `folder` and load its dequantised weights into `reference`. Returns how many tensors are FP8."""
    plain, out = load_file(folder / "model.safetensors"), {}
    kept = dict(plain)
    for name, tensor in plain.items():
        out[name] = tensor
        if name.endswith(STORED_AS_FP8):
            out[name], scales = quantize(tensor)
            out[name + "_scale_inv"] = scales
            kept[name] = dequantize(out[name], scales)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    reloaded = type(reference).from_pretrained(folder)
    reference.load_state_dict(reloaded.state_dict())
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    _declare_fp8(folder)
    return len(out) - len(plain)


def write_random(folder: Path, config: PreTrainedConfig, device: torch.device, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Write an FP8 checkpoint of random weights. Returns the dequantised weights on `device` by tensor name.

    The returned weights are bfloat16, except for biases of routing, which are float32. The engine's function quantises, since the
    slow twin would take minutes for a model of some billion weights.
    """
    config.save_pretrained(folder)
    _declare_fp8(folder)
    model = registry.build(read_spec(folder), dtype=torch.bfloat16, device=torch.device("meta"))
    generator = torch.Generator(device).manual_seed(seed)
    stored, dequantised = {}, {}
    for name, parameter in model.weights().targets.items():
        tensor = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        if "norm" in name:
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("bias"):
            tensor = tensor.float().normal_(0.0, 0.3, generator=generator)
        else:
            tensor.normal_(0.0, config.initializer_range, generator=generator)
        if name.endswith(STORED_AS_FP8):
            quantized, scales = fp8.quantize(tensor, BLOCK)
            stored[name], stored[name + "_scale_inv"] = quantized.cpu(), scales.cpu()
            tensor = dequantize(quantized, scales).bfloat16()
        else:
            stored[name] = tensor.cpu()
        dequantised[name] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return dequantised


def _declare_fp8(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    config["quantization_config"]["weight_block_size"] = list(BLOCK)
    (folder / "config.json").write_text(json.dumps(config))
