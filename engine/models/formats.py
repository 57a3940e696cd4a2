"""Reads how a checkpoint's weights are stored: plain, or FP8 in blocks. Other formats are refused by their name. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from engine.models.config_reader import ConfigReader, read_json
from engine.models.spec import Fp8Spec

SUPPORTED = "supported are weights in BF16, F16, F32 or F64, and quant_method fp8 with weight_block_size"
TO_SAFETENSORS = "load it with transformers and save it again with save_pretrained, which writes safetensors"
ORIGINAL = "serve the folder of safetensors that it was made from"
# Files of other formats, and what would be right. The first that is found is named.
OTHER_FORMATS = {
    "*.gguf": f"GGUF is not supported; {ORIGINAL}",
    "adapter_config.json": "this is a LoRA adapter; merge it into its base model, and serve the result",
    "params.json": "Mistral's own format is not supported; serve the folder that has config.json and model*.safetensors",
    "*.onnx": f"ONNX is not supported; {ORIGINAL}",
    "*.engine": f"TensorRT engines are not supported; {ORIGINAL}",
    **dict.fromkeys(
        ("pytorch_model*.bin", "*.bin", "*.pth", "*.pt", "*.ckpt"), f"pickled files are never read; {TO_SAFETENSORS}"
    ),
    "*.h5": f"TensorFlow's format is not supported; {TO_SAFETENSORS}",
    "*.msgpack": f"Flax's format is not supported; {TO_SAFETENSORS}",
}
# Files that tools write beside config.json, and the tool.
TOOL_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}


def read_quantization(c: ConfigReader) -> Fp8Spec | None:
    """Return how FP8 weights are stored, or None for plain weights. Raises CheckpointError, naming the format."""
    for key, format_name in (("compression_config", "compressed-tensors"), ("quantization", "MLX")):
        if c.section(key) is not None:
            _refuse(c, key, format_name)
    q = c.section("quantization_config")
    if q is None or not q.given:
        return None
    method = _method(q)
    if method != "fp8":
        details = [f"{key} {q.get(key)}" for key in ("format", "quant_algo", "bits", "checkpoint_format") if q.has(key)]
        _refuse(q, "quant_method", f"{method}{' (' + ', '.join(details) + ')' if details else ''}")
    q.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    q.choice("activation_scheme", ("dynamic",), "dynamic")
    block = q.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        q.refuse("weight_block_size", "it must be [rows, columns] of a block, such as [128, 128]")
    return Fp8Spec(block=(block[0], block[1]))


def _method(q: ConfigReader) -> str:
    """Return the name of the format; files of some tools leave out `quant_method`."""
    method = q.get("quant_method")
    if method is not None and not isinstance(method, str):
        q.refuse("quant_method", f"it must name the format of the weights; {SUPPORTED}")
    if method is None and (q.get("load_in_4bit") or q.get("load_in_8bit")):
        return "bitsandbytes"
    if method is None and q.has("quant_algo"):
        return "modelopt"
    return method or "(unnamed)"


def _refuse(c: ConfigReader, key: str, format_name: str) -> NoReturn:
    c.refuse(key, f"weights in the format {format_name} are not supported; {SUPPORTED}")


def check_folder(folder: Path, config: ConfigReader) -> list[str]:
    """Refuse a folder whose format is named in a file of its own. Returns what the log has to say."""
    modelopt = folder / "hf_quant_config.json"
    if modelopt.exists():
        file = read_json(modelopt)
        q = file.section("quantization") or file
        if q.has("quant_algo"):
            _refuse(q, "quant_algo", f"ModelOpt {q.get('quant_algo')}")
        if q.has("kv_cache_quant_algo"):
            algo = q.get("kv_cache_quant_algo")
            return [f"{modelopt}: kv_cache_quant_algo {algo} has no effect: the KV cache has the type of the computation"]
    for name, tool in TOOL_FILES.items():
        if (folder / name).exists() and config.section("quantization_config") is None:
            file = read_json(folder / name)
            key = next((key for key in ("bits", "w_bit", "quant_method") if file.has(key)), None)
            if key is not None:
                _refuse(file, key, tool)
    return []


def other_format(folder: Path) -> str:
    """Describe the files of another format in a folder that lacks ours, for the end of a message; "" if there are none."""
    for pattern, why in OTHER_FORMATS.items():
        if found := next(iter(sorted(folder.glob(pattern))), None):
            return f", but {found.name}: {why}"
    return ""
