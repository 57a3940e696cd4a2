"""Lists the model families, and reads a checkpoint folder's config.json into a ModelSpec. Torch-free.

A family is a set of architectures that one pair of modules serves: NAME_config.py parses config.json, and NAME.py computes
the model (`registry.py` has the table of those classes, which need torch).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.errors import CheckpointError
from engine.models import deepseek_config, dense_config, glm4_moe_config, minimax_m2_config, qwen3_moe_config
from engine.models.config_defaults import DEFAULTS, MODEL_TYPES, SPELLINGS
from engine.models.config_keys import judge, stated
from engine.models.config_reader import ConfigReader, read_json, shown
from engine.models.config_text import TEXT_DEFAULTS, WRAPPERS, text_part
from engine.models.formats import check_folder, other_format
from engine.models.spec import ModelSpec

Family = Literal["dense", "qwen3_moe", "glm4_moe", "minimax_m2", "deepseek"]
Parse = Callable[[ConfigReader, ConfigReader | None], ModelSpec]

PARSERS: dict[Family, Parse] = {
    "dense": dense_config.parse,
    "qwen3_moe": qwen3_moe_config.parse,
    "glm4_moe": glm4_moe_config.parse,
    "minimax_m2": minimax_m2_config.parse,
    "deepseek": deepseek_config.parse,
}
ARCHITECTURES: dict[str, Family] = {
    **dict.fromkeys(dense_config.ARCHITECTURES, "dense"),
    **dict.fromkeys(qwen3_moe_config.ARCHITECTURES, "qwen3_moe"),
    **dict.fromkeys(glm4_moe_config.ARCHITECTURES, "glm4_moe"),
    **dict.fromkeys(minimax_m2_config.ARCHITECTURES, "minimax_m2"),
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
    if not (folder / "config.json").exists() and (other := other_format(folder)):
        raise CheckpointError(f"{folder}: no config.json{other}", param="model")
    config = read_json(folder / "config.json")
    notes = check_folder(folder, config)
    generation = folder / "generation_config.json"
    spec = _parse(config, read_json(generation) if generation.exists() else None)
    return msgspec.structs.replace(spec, notes=(*notes, *spec.notes))


def parse_spec(config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelSpec:
    """Make a ModelSpec from the parsed contents of config.json and generation_config.json. Raises CheckpointError."""
    extra = None if generation is None else ConfigReader(generation, "generation_config.json")
    return _parse(ConfigReader(config, "config.json"), extra)


def _parse(c: ConfigReader, generation: ConfigReader | None) -> ModelSpec:
    outer, architecture = None, _architecture(c)
    own: dict[str, Any] = {}
    if architecture in WRAPPERS:
        wrapper = architecture
        c, text_type, outer = text_part(c)
        own, architecture = TEXT_DEFAULTS.get(text_type, {}), _architecture(c)
    else:
        _check_model_type(c, architecture)
    c = _with_defaults(c, architecture, own)
    spec = PARSERS[ARCHITECTURES[architecture]](c, generation)
    notes = judge(c, architecture, stated(spec)) + ([] if outer is None else judge(outer, wrapper))
    return msgspec.structs.replace(spec, notes=tuple(notes))


def _architecture(c: ConfigReader) -> str:
    """Return the architecture that the file names. A file without `architectures` is judged by its model_type."""
    names, model_type = c.get("architectures"), c.get("model_type")
    if names is None and isinstance(model_type, str) and model_type in MODEL_TYPES:
        names = [MODEL_TYPES[model_type]]
    if names not in [[name] for name in (*ARCHITECTURES, *WRAPPERS)]:
        c.refuse("architectures", f"it must be a list of one of: {', '.join((*ARCHITECTURES, *WRAPPERS))}")
    return str(names[0])


def _check_model_type(c: ConfigReader, architecture: str) -> None:
    """Refuse a model_type of another architecture that is served here. Any other that is not the architecture's is reported."""
    model_type = c.get("model_type")
    if model_type is None or MODEL_TYPES.get(str(model_type)) == architecture:
        return
    if str(model_type) in MODEL_TYPES:
        c.refuse("model_type", f"architectures says {architecture}, and the two must agree")
    c.note(f"model_type {shown(model_type)} is not known; the model is served as {architecture}")


def _with_defaults(c: ConfigReader, architecture: str, own: dict[str, Any]) -> ConfigReader:
    """Return a reader of the same object that knows the family's defaults, `own` before them, and other spellings of keys."""
    spelling = {}
    for name, key in SPELLINGS.get(architecture, {}).items():
        if not c.is_given(name):
            continue
        if not c.is_given(key):
            spelling[key] = name
        elif c.given[key] != c.given[name]:
            c.refuse(name, f"{key} is {c.given[key]}, and the two must be equal")
    known = {name for name in SPELLINGS.get(architecture, {}) if name not in spelling.values()}
    given = {k: v for k, v in c.given.items() if k not in known} | {"architectures": [architecture]}
    if given.get("rope_parameters") is None:
        given.pop("rope_parameters", None)  # null is as good as absence: a family may have rotary settings as its default
    reader = ConfigReader(
        given, c.source, c.path, defaults=DEFAULTS[architecture] | own, spelling=spelling, inherited=c.inherited
    )
    reader.notes.extend(c.notes)
    return reader
