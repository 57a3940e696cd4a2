"""Loads safetensors checkpoints into a model's allocated parameters. Pickled files are never read.

Names, shapes and types of all tensors are validated against the model before the first byte is copied. A fused parameter is
filled slice by slice. FP8 block weights are converted to the parameter's type on its device. For a CUDA device the bytes are
streamed (`stream.py`); for other devices tensors are read one at a time.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import CheckpointError
from engine.models import registry
from engine.models.base import WeightMap
from engine.models.config_reader import read_json
from engine.models.deepseek_mtp import DeepseekMtp, mtp_prefix
from engine.models.spec import Fp8Spec, ModelSpec
from engine.quant import fp8
from engine.startup import Progress, no_report
from engine.weights import stream

INDEX = "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16")
FP8 = "F8_E4M3"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, FP8: torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a safetensors file whose data has not been read."""

    name: str
    file: Path
    handle: Any
    shape: tuple[int, ...]
    dtype: str

    def refuse(self, why: str) -> NoReturn:
        raise CheckpointError(f"{self.file}: tensor {self.name} {why}", param="model")

    def read(self) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self.handle.get_tensor(self.name)
        except SafetensorError as error:
            self.refuse(f"cannot be read: {error}")
        return tensor


class Loadable(Protocol):
    """A model, or another module whose weights are in the model's checkpoint (such as multi-token prediction)."""

    @property
    def spec(self) -> ModelSpec: ...
    def weights(self) -> WeightMap: ...


def load(model: Loadable, folder: str | Path, progress: Progress = no_report) -> None:
    """Fill `model` from the checkpoint in `folder`, and call `progress` after each tensor or piece of one.

    Raises CheckpointError, naming tensor and file.
    """
    weights, block = model.weights(), model.spec.fp8
    with ExitStack() as stack:
        stored, scales = _open_checked(Path(folder), weights, block, stack)
        with torch.no_grad():
            _fill(stored, scales, weights, block, progress)
            for name, original in weights.copies.items():
                if name in stored and not torch.equal(stored[name].read().to(original), original):
                    stored[name].refuse("differs from the main model's, which is used in its place: the two must be equal")


def verify(model: Loadable, folder: str | Path) -> None:
    """Validate the checkpoint in `folder` for `model`. Only the headers of its files are read.

    Raises the CheckpointError that `load` would raise for wrong names, shapes and types, and for truncated files.
    """
    with ExitStack() as stack:
        _open_checked(Path(folder), model.weights(), model.spec.fp8, stack)


def has_mtp(spec: ModelSpec, folder: str | Path) -> bool:
    """Whether the checkpoint's files hold a multi-token prediction module. config.json may promise one that is missing."""
    with ExitStack() as stack:
        names = _open(Path(folder), stack)
    return spec.num_mtp_layers > 0 and any(name.startswith(mtp_prefix(spec)) for name in names)


def load_mtp(model: registry.Model, folder: str | Path) -> DeepseekMtp:
    """Build and fill the multi-token prediction module of the checkpoint in `folder`, which `model` was loaded from.

    Raises CheckpointError if the architecture or the checkpoint has none, and for every reason that `load` has.
    """
    mtp = registry.build_mtp(model)
    if not has_mtp(model.spec, folder):
        raise CheckpointError(
            f"{folder}: no multi-token prediction module: num_nextn_predict_layers is {model.spec.num_mtp_layers} in "
            f"config.json, but no tensor is named {mtp_prefix(model.spec)}*",
            param="model",
        )
    load(mtp, folder)
    return mtp


def _open_checked(
    folder: Path, weights: WeightMap, block: Fp8Spec | None, stack: ExitStack
) -> tuple[dict[str, _Stored], dict[str, _Stored]]:
    """Open and validate the checkpoint; return its tensors by name, and its FP8 scales by the name of their weight."""
    stored = _open(folder, stack)
    scales = _take_scales(stored, weights, block)
    _check(folder, stored, weights, scales)
    return stored, scales


def _open(folder: Path, stack: ExitStack) -> dict[str, _Stored]:
    """Return every tensor of the checkpoint by name, from the one file or from the shards that the index lists."""
    index = _read_index(folder)
    files = sorted({folder / shard for shard in index.values()}) if index else [_single_file(folder)]
    stored: dict[str, _Stored] = {}
    for file in files:
        for tensor in _open_file(file, stack):
            if tensor.name in stored:
                tensor.refuse(f"is also in {stored[tensor.name].file}")
            stored[tensor.name] = tensor
    for name, shard in index.items():
        if name not in stored or stored[name].file.name != shard:
            raise CheckpointError(f"{folder / shard}: tensor {name} is missing, although {INDEX} lists it", param="model")
    return stored


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    if not path.exists():
        return {}
    shards = read_json(path).data.get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(s, str) for s in shards.values()):
        raise CheckpointError(f"{path}: weight_map must map tensor names to file names", param="model")
    for name, shard in shards.items():
        if Path(shard).name != shard:
            raise CheckpointError(f"{path}: tensor {name} is in {shard!r}: it must be a file of this folder", param="model")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder / shard}: no such file, although {INDEX} lists it for tensor {name}", param="model")
    return shards


def _single_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    standard = folder / "model.safetensors"
    if standard in files or len(files) == 1:
        return standard if standard in files else files[0]
    found = f"{len(files)} .safetensors files but no {INDEX}" if files else "no .safetensors file, and no other format is read"
    raise CheckpointError(f"{folder}: {found}", param="model")


def _open_file(file: Path, stack: ExitStack) -> list[_Stored]:
    try:
        handle = stack.enter_context(safe_open(str(file), framework="pt"))
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
        return [_Stored(n, file, handle, tuple(s.get_shape()), str(s.get_dtype())) for n, s in slices.items()]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a complete safetensors file: {error}", param="model") from None


def _take_scales(stored: dict[str, _Stored], weights: WeightMap, block: Fp8Spec | None) -> dict[str, _Stored]:
    """Remove the FP8 scales from `stored` and return them, keyed by the name of the weight that each one scales."""
    if block is None:
        return {}
    owners = [name for name in weights.targets if name + fp8.SCALE_SUFFIX in stored]
    return {name: stored.pop(name + fp8.SCALE_SUFFIX) for name in owners}


def _check(folder: Path, stored: dict[str, _Stored], weights: WeightMap, scales: dict[str, _Stored]) -> None:
    missing = sorted(weights.targets.keys() - stored.keys())
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}", param="model")
    for name, tensor in stored.items():
        wanted = weights.targets.get(name, weights.copies.get(name))
        if wanted is not None:
            _check_tensor(tensor, tuple(wanted.shape), scales.get(name))
        elif not weights.skip.fullmatch(name):
            tensor.refuse("is unexpected: this architecture has no tensor of that name")


def _check_tensor(tensor: _Stored, shape: tuple[int, ...], scale: _Stored | None) -> None:
    if tensor.shape != shape:
        tensor.refuse(f"has shape {list(tensor.shape)}, but config.json calls for {list(shape)}")
    if tensor.dtype == FP8:
        if scale is None:
            tensor.refuse(f"is {FP8}, but its scales ({tensor.name}{fp8.SCALE_SUFFIX}) or quantization_config are missing")
    elif tensor.dtype not in FLOATS:
        tensor.refuse(f"has type {tensor.dtype}; supported are {', '.join((*FLOATS, FP8))}")
    elif scale is not None:
        scale.refuse(f"is a scale, but the weight that it belongs to is {tensor.dtype}, which takes none")


def _fill(
    stored: dict[str, _Stored], scales: dict[str, _Stored], weights: WeightMap, block: Fp8Spec | None, progress: Progress
) -> None:
    for name, scale in scales.items():
        _check_scale(scale, stored[name], block)
    devices = {target.device for target in weights.targets.values()}
    if len(devices) == 1 and (device := devices.pop()).type == "cuda":
        stream.fill(transfers(stored, scales, weights, block), device, progress)
        return
    for name, target in weights.targets.items():
        _copy(stored[name], scales.get(name), target, block)
        progress()


def _check_scale(scale: _Stored, tensor: _Stored, block: Fp8Spec | None) -> None:
    if block is None:
        return
    expected = fp8.scale_shape(tensor.shape, block.block)
    if scale.shape != expected or scale.dtype not in FLOATS:
        scale.refuse(
            f"is {scale.dtype} {list(scale.shape)}: it must be F32 {list(expected)}, one for each block of {block.block}"
        )


def _copy(tensor: _Stored, scale: _Stored | None, target: torch.Tensor, block: Fp8Spec | None) -> None:
    if scale is None or block is None:
        target.copy_(tensor.read())
        return
    target.copy_(fp8.dequantize(tensor.read().to(target.device), scale.read().to(target.device), block.block))


def transfers(
    stored: dict[str, _Stored], scales: dict[str, _Stored], weights: WeightMap, block: Fp8Spec | None
) -> list[stream.Transfer]:
    """Describe all copies from the checkpoint to parameters as transfers for `stream.fill`.

    `_copy` makes the same copies one by one.
    """
    offsets = {file: stream.offsets(file) for file in {tensor.file for tensor in stored.values()}}

    def source(tensor: _Stored) -> stream.Source:
        return stream.Source(tensor.name, tensor.file, offsets[tensor.file][tensor.name], tensor.shape, DTYPES[tensor.dtype])

    out = []
    for name, target in weights.targets.items():
        if (scale := scales.get(name)) is None or block is None:
            out.append(stream.Transfer(target, (source(stored[name]),)))
        else:
            decode = partial(fp8.dequantize, block=block.block)
            out.append(stream.Transfer(target, (source(stored[name]), source(scale)), decode))
    return out
