"""Loads safetensors checkpoints into a model's allocated parameters. Pickled files are never read.

Names, shapes and types of all tensors are validated against the model before the first byte is copied. A fused parameter is
filled slice by slice. FP8 block weights are converted to the parameter's type on its device. For a CUDA device the bytes are
streamed (`stream.py`); for other devices tensors are read one at a time. `files.py` finds and opens the files.

What the file holds decides where it and config.json disagree about the head: a head that differs from the embedding is used.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from engine.errors import CheckpointError
from engine.models import registry
from engine.models.base import HEAD, DecoderModel, WeightMap
from engine.models.deepseek_mtp import DeepseekMtp, mtp_prefix
from engine.models.spec import Fp8Spec, ModelSpec
from engine.quant import fp8
from engine.startup import Progress, no_report
from engine.weights import stream
from engine.weights.files import Stored, open_folder

FLOATS = ("F64", "F32", "BF16", "F16")
FP8 = "F8_E4M3"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, FP8: torch.float8_e4m3fn}
EMBEDDING = "model.embed_tokens.weight"
SHOWN = 5  # kinds of names of unused tensors that a line of the log shows
ROWS = 4096  # rows of the embedding and the head that are compared at a time

log = logging.getLogger("tidegate.engine")


class Loadable(Protocol):
    """A model, or another module whose weights are in the model's checkpoint (such as multi-token prediction)."""

    @property
    def spec(self) -> ModelSpec: ...
    def weights(self) -> WeightMap: ...


def load(model: Loadable, folder: str | Path, progress: Progress = no_report) -> None:
    """Fill `model` from the checkpoint in `folder`, and call `progress` after each tensor or piece of one.

    Raises CheckpointError, naming tensor and file.
    """
    block = model.spec.fp8
    with ExitStack() as stack:
        stored = open_folder(Path(folder), stack)
        _untie_head(model, stored, compare=True)
        weights = model.weights()
        scales = _check_all(Path(folder), stored, weights, block)
        _report_unused(Path(folder), stored, weights)
        with torch.no_grad():
            _fill(stored, scales, weights, block, progress)
            for name, original in weights.copies.items():
                if name in stored and not torch.equal(stored[name].read().to(original), original):
                    stored[name].refuse("differs from the main model's, which is used in its place: the two must be equal")
            _refuse_nan(stored, weights)


def verify(model: Loadable, folder: str | Path) -> None:
    """Validate the checkpoint in `folder` for `model`. Only the headers of its files are read.

    Raises the CheckpointError that `load` would raise for wrong names, shapes and types, and for truncated files.
    """
    with ExitStack() as stack:
        stored = open_folder(Path(folder), stack)
        _untie_head(model, stored, compare=False)
        _check_all(Path(folder), stored, model.weights(), model.spec.fp8)


def has_mtp(spec: ModelSpec, folder: str | Path) -> bool:
    """Whether the checkpoint's files hold a multi-token prediction module. config.json may promise one that is missing."""
    with ExitStack() as stack:
        names = open_folder(Path(folder), stack)
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


def _untie_head(model: Loadable, stored: dict[str, Stored], *, compare: bool) -> None:
    """Give a tied model a head of its own if the checkpoint holds one that differs from the embedding.

    Without `compare`, no data is read, and a head that is there counts as different. If the checkpoint has the matrix under the
    head's name alone, that is the embedding's too.
    """
    if not isinstance(model, DecoderModel) or not model.head_is_tied or HEAD not in stored:
        return
    if EMBEDDING not in stored:
        stored[EMBEDDING] = stored.pop(HEAD)
    elif not compare:
        model.untie_head()
    elif _differ(stored[HEAD], stored.get(EMBEDDING)):
        model.untie_head()
        log.warning(
            "%s: config.json ties the head to the embedding (tie_word_embeddings), but %s differs from it and is used",
            stored[HEAD].file,
            HEAD,
        )


def _differ(head: Stored, embedding: Stored | None) -> bool:
    """Whether two stored matrices differ in shape, type or any number. They are compared a few rows at a time."""
    if embedding is None or (head.shape, head.dtype) != (embedding.shape, embedding.dtype) or len(head.shape) != 2:
        return True
    starts = range(0, head.shape[0], ROWS)
    return any(not torch.equal(head.rows(i, i + ROWS), embedding.rows(i, i + ROWS)) for i in starts)


def _check_all(folder: Path, stored: dict[str, Stored], weights: WeightMap, block: Fp8Spec | None) -> dict[str, Stored]:
    """Validate the tensors of the checkpoint. Takes the FP8 scales out of `stored`; returns them by the name of their weight."""
    scales = _take_scales(stored, weights, block)
    _check(folder, stored, weights, scales)
    return scales


def _report_unused(folder: Path, stored: dict[str, Stored], weights: WeightMap) -> None:
    """Say in the log which tensors are left out and why: a line for each reason."""
    groups: dict[str, Counter[str]] = {}
    for name in stored.keys() - weights.targets.keys():
        if reason := _reason(name, weights):
            groups.setdefault(reason, Counter())[_kind(stored[name].name)] += 1
    for reason, kinds in groups.items():
        names = ", ".join(sorted(kinds)[:SHOWN]) + (" and others" if len(kinds) > SHOWN else "")
        log.info("%s: %d tensors are not used: %s (%s)", folder, kinds.total(), names, reason)


def _kind(name: str) -> str:
    """Return a tensor's name with * for its numbers, or for all after the name of a part that is not the text model."""
    parts = name.split(".")
    if "layers" not in parts or any(part.startswith(("vis", "audio", "multi_modal")) for part in parts):
        return ".".join(parts[:2]) + ".*" if parts[0] == "model" and len(parts) > 2 else f"{parts[0]}.*"
    return re.sub(r"\.\d+\.", ".*.", name)


def _reason(name: str, weights: WeightMap) -> str | None:
    """Return why the tensor `name` is not used ("" if the log need not say it), or None if it is not one to be left out."""
    return next((reason for pattern, reason in weights.skip.items() if re.fullmatch(pattern, name)), None)


def _refuse_nan(stored: dict[str, Stored], weights: WeightMap) -> None:
    """Refuse norms, biases and other vectors with numbers that are not finite. Every token would be computed with them.

    Matrices are not read again: a row of NaN in them fails the requests that meet it.
    """
    vectors = {name: target for name, target in weights.targets.items() if target.dim() == 1}
    if vectors:
        finite = torch.stack([target.isfinite().all() for target in vectors.values()]).tolist()
        for name, good in zip(vectors, finite, strict=True):
            if not good:
                stored[name].refuse("holds NaN or infinity, so that no token could be computed")


def _take_scales(stored: dict[str, Stored], weights: WeightMap, block: Fp8Spec | None) -> dict[str, Stored]:
    """Remove the FP8 scales from `stored` and return them, keyed by the name of the weight that each one scales."""
    if block is None:
        return {}
    owners = [name for name in weights.targets if name + fp8.SCALE_SUFFIX in stored]
    return {name: stored.pop(name + fp8.SCALE_SUFFIX) for name in owners}


def _check(folder: Path, stored: dict[str, Stored], weights: WeightMap, scales: dict[str, Stored]) -> None:
    missing = sorted(weights.targets.keys() - stored.keys())
    if missing:
        hint = "; if the head is the embedding, set tie_word_embeddings to true in config.json" if missing == [HEAD] else ""
        raise CheckpointError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}{hint}", param="model")
    for name, tensor in stored.items():
        wanted = weights.targets.get(name, weights.copies.get(name))
        if wanted is not None:
            _check_tensor(tensor, tuple(wanted.shape), scales.get(name))
        elif _reason(name, weights) is None:
            tensor.refuse("is unexpected: this architecture has no tensor of that name")


def _check_tensor(tensor: Stored, shape: tuple[int, ...], scale: Stored | None) -> None:
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
    stored: dict[str, Stored], scales: dict[str, Stored], weights: WeightMap, block: Fp8Spec | None, progress: Progress
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


def _check_scale(scale: Stored, tensor: Stored, block: Fp8Spec | None) -> None:
    if block is None:
        return
    expected = fp8.scale_shape(tensor.shape, block.block)
    if scale.shape != expected or scale.dtype not in FLOATS:
        scale.refuse(
            f"is {scale.dtype} {list(scale.shape)}: it must be F32 {list(expected)}, one for each block of {block.block}"
        )


def _copy(tensor: Stored, scale: Stored | None, target: torch.Tensor, block: Fp8Spec | None) -> None:
    if scale is None or block is None:
        target.copy_(tensor.read())
        return
    target.copy_(fp8.dequantize(tensor.read().to(target.device), scale.read().to(target.device), block.block))


def transfers(
    stored: dict[str, Stored], scales: dict[str, Stored], weights: WeightMap, block: Fp8Spec | None
) -> list[stream.Transfer]:
    """Describe all copies from the checkpoint to parameters as transfers for `stream.fill`.

    `_copy` makes the same copies one by one.
    """
    offsets = {file: stream.offsets(file) for file in {tensor.file for tensor in stored.values()}}

    def source(tensor: Stored) -> stream.Source:
        return stream.Source(tensor.name, tensor.file, offsets[tensor.file][tensor.name], tensor.shape, DTYPES[tensor.dtype])

    out = []
    for name, target in weights.targets.items():
        if (scale := scales.get(name)) is None or block is None:
            out.append(stream.Transfer(target, (source(stored[name]),)))
        else:
            decode = partial(fp8.dequantize, block=block.block)
            out.append(stream.Transfer(target, (source(stored[name]), source(scale)), decode))
    return out
