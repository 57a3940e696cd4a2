"""Cost files: the step cost of one device, model and precision as one JSON file.

An engine that starts from such a file predicts its first steps. A file is read strictly: costs of another device or model, or a
torn file, would be worse than none. It is written under a temporary name and renamed, so that no reader sees a part of it.
"""

from __future__ import annotations

import os
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import msgspec

from engine.config import EngineConfig
from engine.errors import ConfigError, InternalError
from engine.scheduler.cost_table import CostTable
from engine.scheduler.step_cost import StepCost

VERSION = 2
LONGEST = 3600.0  # seconds; a step that takes longer is an error in the file, and sums of such numbers would overflow
REMEDY = "write the file again, or unset the setting: then the costs are learnt while the engine serves"


class CostKey(NamedTuple):
    """Says what a cost file belongs to."""

    device: str  # for example "NVIDIA H200"
    model: str  # name of the checkpoint's folder
    precision: str  # for example "bfloat16"


class CostFile(NamedTuple):
    key: CostKey
    source: str  # where the figures come from, for people
    table: CostTable


class _Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The JSON object of a file. The first three keys after `version` are those of CostKey, the last ones those of CostTable."""

    version: int
    device: str
    model: str
    precision: str
    source: str
    decode_rows: list[int]
    decode_seconds: list[float]
    step_tokens: list[int]
    step_seconds: list[float]
    kv_token_seconds: float
    attention_pair_seconds: float
    long_pair_seconds: float


def save_costs(path: str | Path, key: CostKey, source: str, table: CostTable) -> None:
    """Write a cost file. An existing file is replaced in one moment."""
    path = Path(path)
    content = msgspec.json.format(msgspec.json.encode(_Content(VERSION, *key, source, **table._asdict())), indent=2)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load_costs(path: str | Path, *, setting: str) -> CostFile:
    """Read a cost file, whose path is the value of `setting`. Raises ConfigError, naming file, key, value and remedy."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{setting} is {str(path)!r}, which cannot be read ({error.strerror}): name a cost file, or unset the setting",
            param=setting,
        ) from None
    _check_version(data, path, setting)
    try:
        content = msgspec.json.decode(data, type=_Content)
    except msgspec.ValidationError as error:
        raise _wrong(path, str(error), setting) from None
    _check_list("decode_rows", content.decode_rows, "decode_seconds", content.decode_seconds, path, setting)
    _check_list("step_tokens", content.step_tokens, "step_seconds", content.step_seconds, path, setting)
    for name in ("kv_token_seconds", "attention_pair_seconds", "long_pair_seconds"):
        _check_seconds(name, getattr(content, name), path, setting)
    values = msgspec.structs.astuple(content)
    return CostFile(CostKey(*values[1:4]), content.source, CostTable(*values[5:]))


def cost_key(config: EngineConfig, device: str) -> CostKey:
    """Return what an engine of the resolved `config` runs. A simulated device is what its own cost file says."""
    if config.runner == "fake" and config.fake.cost_file is not None:
        return load_costs(config.fake.cost_file, setting="fake.cost_file").key
    return CostKey(device, Path(config.model).resolve().name, config.dtype)


def seeded_cost(config: EngineConfig, key: CostKey, learnt: CostTable | None = None) -> StepCost:
    """Return the StepCost of an engine, which starts from the file that the resolved `config` names, or else from `learnt`.

    `key` says what the engine runs. Raises ConfigError if the file cannot be used, or belongs to something else.
    """
    if config.scheduler.max_step_tokens is None:
        raise InternalError("the step cost needs a resolved config")
    size = config.scheduler.max_num_seqs, config.scheduler.max_step_tokens
    path = config.batching.cost_file
    if path is None:
        return StepCost.of_size(*size, learnt)
    setting = "batching.cost_file"
    file = load_costs(path, setting=setting)
    for name, has, needed in zip(CostKey._fields, file.key, key, strict=True):
        if has != needed:
            raise _wrong(path, f"{name} is {has!r}, but this engine's is {needed!r}", setting)
    return StepCost.of_size(*size, file.table)


def _check_version(data: bytes, path: str | Path, setting: str) -> None:
    """Check the version before anything else: a file of another version may have other keys."""
    try:
        content = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:  # the latter for a file of brackets in brackets
        raise _wrong(path, f"it is not a complete JSON document ({error})", setting) from None
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION or isinstance(version, bool):
        raise _wrong(path, f"version is {version!r}, and this program reads version {VERSION}", setting)


def _check_list(sizes_name: str, sizes: list[int], name: str, seconds: list[float], path: str | Path, setting: str) -> None:
    """Check a list of ascending sizes, and the list of seconds that belongs to it, which must not fall."""
    if not sizes:
        raise _wrong(path, f"{sizes_name} is empty", setting)
    if len(sizes) != len(seconds):
        raise _wrong(path, f"{sizes_name} has {len(sizes)} entries, and {name} has {len(seconds)}: they belong in pairs", setting)
    for index, (before, after) in enumerate(pairwise([0, *sizes])):
        if after <= before:
            raise _wrong(path, f"{sizes_name}[{index}] is {after}: sizes must be at least 1 and ascend", setting)
    for index, value in enumerate(seconds):
        _check_seconds(f"{name}[{index}]", value, path, setting)
        earlier = seconds[max(0, index - 1)]
        if value < earlier:
            raise _wrong(
                path, f"{name}[{index}] is {value}, less than {earlier} before it: a larger step is never faster", setting
            )


def _check_seconds(name: str, value: float, path: str | Path, setting: str) -> None:
    if not 0 <= value <= LONGEST:
        raise _wrong(path, f"{name} is {value}: it must be a number of seconds from 0 to {LONGEST:g}", setting)


def _wrong(path: str | Path, what: str, setting: str) -> ConfigError:
    return ConfigError(f"cost file {str(path)!r} ({setting}): {what}; {REMEDY}", param=setting)
