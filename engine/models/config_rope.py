"""Reads the rotary embedding of a config.json: rope_theta, rope_scaling (transformers 4) or rope_parameters (5). Torch-free."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from engine.layers.kinds import RopeSpec
from engine.models.config_reader import ConfigReader

MAX_LEN = 1 << 25  # several times the longest known context
MIN_THETA = 1.5  # YaRN divides by the logarithm of theta, so theta must be well above 1
# "mrope" is the plain embedding for a text, whose tokens have the same position on all three axes.
KINDS = ("default", "linear", "llama3", "yarn", "dynamic", "mrope")


def positions(c: ConfigReader) -> int:
    return c.integer("max_position_embeddings", high=MAX_LEN)


def rope_section(c: ConfigReader) -> ConfigReader:
    """Return the object with the rotary settings; an empty one if there is none."""
    old, new = c.section("rope_scaling"), c.section("rope_parameters")
    if old is None or not old.given:
        return new or ConfigReader({}, c.source, f"{c.path}rope_parameters.")
    if new is not None and c.is_given("rope_parameters") and new.given and _settings(c, new) != _settings(c, old):
        c.refuse("rope_scaling", "rope_parameters is given too, and differs from it; keep one of the two")
    c.sections.pop("rope_parameters", None)  # the same once more, or the family's default, which is used only as a whole
    return old


def _settings(c: ConfigReader, section: ConfigReader) -> dict[str, Any]:
    """Return the settings of `section` in one spelling, theta included."""
    given = {key: value for key, value in section.given.items() if value is not None}
    kind = given.pop("type", "default")
    return {"rope_theta": c.get("rope_theta"), "rope_type": kind} | given


def rope(c: ConfigReader, dim: int, *, interleaved: bool = False, partial: bool = False) -> RopeSpec:
    """Read the rotary embedding of heads of `dim` numbers, with the scaling that the rope section asks for.

    If `partial` is set, it may turn only the first numbers of a head.
    """
    if not interleaved and c.is_given("rope_interleave") and c.flag("rope_interleave"):
        c.refuse("rope_interleave", "interleaved rotary pairs are supported for multi-head latent attention only")
    r = rope_section(c)
    if any(isinstance(value, dict) for value in r.given.values()):
        c.refuse(r.path.removeprefix(c.path).rstrip("."), "rotary embeddings that differ between layers are not supported")
    dim = _rotary_dim(c, r, dim, partial=partial)
    plain = RopeSpec(theta=_theta(c, r), dim=dim, interleaved=interleaved)
    kind = _kind(r)
    if kind in ("default", "mrope"):
        return plain
    if kind == "linear":
        return msgspec.structs.replace(plain, scaling="linear", factor=r.number("factor"))
    if kind == "dynamic":
        r.number("factor")
        r.note(f"{r.path}factor has no effect: dynamic scaling begins past {positions(c)} tokens, where the context ends")
        return plain
    original = _original_len(c, r)
    plain = msgspec.structs.replace(plain, original_max_len=original)
    return _yarn(c, r, plain) if kind == "yarn" else _llama3(r, plain)


def yarn_mscale(factor: float, mscale: float) -> float:
    """Compute how much YaRN sharpens attention for a context that is stretched `factor` times (YaRN paper, section 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def query_scaling(c: ConfigReader, spec: RopeSpec) -> RopeSpec:
    """Add Ministral 3's scaling of queries far into a long context, if the rope section asks for it."""
    r = rope_section(c)
    if not r.has("llama_4_scaling_beta"):
        return spec
    return msgspec.structs.replace(
        spec, query_beta=r.number("llama_4_scaling_beta", low=0.0), original_max_len=_original_len(c, r)
    )


def _kind(r: ConfigReader) -> str:
    if r.has("rope_type") and r.has("type") and r.get("type") != r.get("rope_type"):
        r.refuse("type", f"rope_type is {r.get('rope_type')!r}, and the two must be equal")
    return r.choice("rope_type" if r.has("rope_type") else "type", KINDS, "default")


def _theta(c: ConfigReader, r: ConfigReader) -> float:
    outer = c.number("rope_theta", low=MIN_THETA)
    inner = r.number("rope_theta", outer, low=MIN_THETA)
    if inner != outer and c.is_given("rope_theta"):
        c.note(f"rope_theta {outer:g} has no effect: {r.path}rope_theta is {inner:g}")
    return inner


def _rotary_dim(c: ConfigReader, r: ConfigReader, dim: int, *, partial: bool) -> int:
    """Return how many numbers of a head are rotated: `dim` times partial_rotary_factor, or rotary_dim."""
    key = "partial_rotary_factor"
    owner = r if r.has(key) else c
    rotated = int(dim * owner.number(key, 1.0))
    if c.has("rotary_dim"):
        stated = c.integer("rotary_dim")
        if owner.has(key) and stated != rotated:
            c.refuse("rotary_dim", f"{owner.path}{key} is {owner.get(key)}, which is {rotated} of the {dim} numbers of a head")
        owner, key, rotated = c, "rotary_dim", stated
    if rotated != dim and not partial:
        owner.refuse(key, "rotary embedding over a part of each head is not supported for this architecture")
    if rotated == dim and dim % 2:
        c.refuse("qk_rope_head_dim" if c.has("qk_rope_head_dim") else "head_dim", "rotary embedding needs an even number")
    if rotated % 2 or not 0 < rotated <= dim:
        owner.refuse(key, f"it gives {rotated} rotated numbers; it must give an even number from 2 to {dim}")
    return rotated


def _original_len(c: ConfigReader, r: ConfigReader) -> int:
    """Return the context before it was stretched. The key at the top level wins, as in transformers."""
    key = "original_max_position_embeddings"
    inner = r.integer(key, positions(c), high=MAX_LEN)
    outer = c.integer(key, inner, high=MAX_LEN)
    if r.has(key) and inner != outer:
        r.note(f"{r.path}{key} {inner} has no effect: {c.path}{key} is {outer}")
    return outer


def _llama3(r: ConfigReader, plain: RopeSpec) -> RopeSpec:
    low, high = r.number("low_freq_factor"), r.number("high_freq_factor")
    if low >= high:
        r.refuse("low_freq_factor", f"it must be below high_freq_factor ({high})")
    return msgspec.structs.replace(plain, scaling="llama3", factor=r.number("factor"), low_freq_factor=low, high_freq_factor=high)


def _yarn(c: ConfigReader, r: ConfigReader, plain: RopeSpec) -> RopeSpec:
    factor = r.number("factor", positions(c) / plain.original_max_len)
    if plain.original_max_len * factor > MAX_LEN:
        r.refuse("factor", f"times {plain.original_max_len} positions it must be at most {MAX_LEN}")
    return msgspec.structs.replace(
        plain,
        scaling="yarn",
        factor=factor,
        beta_fast=r.number("beta_fast", 32.0),
        beta_slow=r.number("beta_slow", 1.0),
        truncate=r.flag("truncate", "truncate" not in r.given),  # null is false, as in transformers
        magnitude=_magnitude(r, factor),
    )


def _magnitude(r: ConfigReader, factor: float) -> float:
    """Return YaRN's factor of cos and sin: attention_factor, or what the stretching asks for, times attn_factor."""
    mscales = r.get("mscale"), r.get("mscale_all_dim")
    if r.has("attention_factor"):
        if r.has("attn_factor"):
            r.refuse("attn_factor", "attention_factor is given too; keep one of the two")
        return r.number("attention_factor")
    if all(mscales):
        magnitude = yarn_mscale(factor, r.number("mscale")) / yarn_mscale(factor, r.number("mscale_all_dim"))
    else:
        magnitude = yarn_mscale(factor, 1.0)
    return magnitude * r.number("attn_factor", 1.0)
