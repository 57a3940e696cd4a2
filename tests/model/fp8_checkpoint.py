"""Turns a plain checkpoint folder into a block-scaled FP8 one, and the reference model's weights into what FP8 keeps of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

BLOCK = (128, 128)
E4M3_MAX = 448.0


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-> e4m3 [N, M] and the scale of each block, block by block; the slow twin of the engine's."""
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
    """Element by element, unlike the engine's."""
    rows, columns = torch.arange(weight.shape[0]) // BLOCK[0], torch.arange(weight.shape[1]) // BLOCK[1]
    return weight.float() * scales[rows][:, columns]


def to_fp8(folder: Path, reference: PreTrainedModel) -> int:
    """Rewrite `folder`, reload `reference` with the dequantised weights -> number of tensors that became FP8."""
    plain, out = load_file(folder / "model.safetensors"), {}
    kept = dict(plain)
    for name, tensor in plain.items():
        out[name] = tensor
        if name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
            out[name], scales = quantize(tensor)
            out[name + "_scale_inv"] = scales
            kept[name] = dequantize(out[name], scales)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    reloaded = type(reference).from_pretrained(folder)
    reference.load_state_dict(reloaded.state_dict())
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    config["quantization_config"]["weight_block_size"] = list(BLOCK)
    (folder / "config.json").write_text(json.dumps(config))
    return len(out) - len(plain)
