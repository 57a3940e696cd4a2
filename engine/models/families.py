"""Lists the model families, and reads a checkpoint folder's config.json into a ModelSpec. Torch-free.

A family is a set of architectures that one pair of modules serves: NAME_config.py parses config.json, and NAME.py computes
the model (`registry.py` has the table of those classes, which need torch).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from engine.errors import CheckpointError
from engine.models import deepseek_config, dense_config, qwen3_moe_config
from engine.models.config_reader import ConfigReader, read_json
from engine.models.spec import ModelSpec

Family = Literal["dense", "qwen3_moe", "deepseek"]
Parse = Callable[[ConfigReader, ConfigReader | None], ModelSpec]

PARSERS: dict[Family, Parse] = {
    "dense": dense_config.parse,
    "qwen3_moe": qwen3_moe_config.parse,
    "deepseek": deepseek_config.parse,
}
ARCHITECTURES: dict[str, Family] = {
    **dict.fromkeys(dense_config.ARCHITECTURES, "dense"),
    **dict.fromkeys(qwen3_moe_config.ARCHITECTURES, "qwen3_moe"),
    **dict.fromkeys(deepseek_config.ARCHITECTURES, "deepseek"),
}


def read_spec(folder: str | Path) -> ModelSpec:
    """Read `config.json`, and the end-of-sequence ids of `generation_config.json` if that file exists.

    Raises CheckpointError, naming file and key, for a folder that is not there, a file that cannot be read, and a
    config.json that asks for something the models here cannot compute.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder that holds the model's config.json", param="model")
    generation = folder / "generation_config.json"
    return _parse(read_json(folder / "config.json"), read_json(generation) if generation.exists() else None)


def parse_spec(config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelSpec:
    """Make a ModelSpec from the parsed contents of config.json and generation_config.json. Raises CheckpointError."""
    extra = None if generation is None else ConfigReader(generation, "generation_config.json")
    return _parse(ConfigReader(config, "config.json"), extra)


def _parse(c: ConfigReader, generation: ConfigReader | None) -> ModelSpec:
    names = c.data.get("architectures")
    if names not in [[name] for name in ARCHITECTURES]:
        c.refuse("architectures", f"it must be a list of one of: {', '.join(ARCHITECTURES)}")
    return PARSERS[ARCHITECTURES[str(names[0])]](c, generation)
