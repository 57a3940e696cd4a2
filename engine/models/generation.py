"""Reads the sampling defaults of generation_config.json: how the model's author means it to be sampled. Torch-free.

The end-of-sequence ids of that file are read with config.json (`families.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from engine.models.config_reader import ConfigReader, read_json
from engine.request import BOUNDS, MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS

# Key of the file -> field of SamplingParams.
_NUMBERS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
_REMEDY = "set generation_config to off to leave these defaults out"
_WHOLE = ("top_k", "max_new_tokens")
_READ = {*_NUMBERS, "do_sample", "bad_words_ids", "suppress_tokens", "eos_token_id"}
# Keys that change nothing here, whatever their value. Most are about transformers' own code: caches, compilation, the form of its
# answers, and drafts, which do not change what is generated. max_length is its limit on prompt and output; max_model_len is ours.
_HARMLESS = frozenset(
    {
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_lookbehind",
        "bos_token_id",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "decoder_start_token_id",
        "disable_compile",
        "early_stopping",
        "is_assistant",
        "low_memory",
        "max_length",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "pad_token_id",
        "prefill_chunk_size",
        "prompt_lookup_num_tokens",
        "remove_invalid_values",
        "renormalize_logits",
        "return_dict_in_generate",
        "return_legacy_cache",
        "target_lookbehind",
        "transformers_version",
        "trust_remote_code",
        "use_cache",
    }
)
# Keys that this server does not honour -> the values that ask for nothing. Every other value is reported by the key's name.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "diversity_penalty": (0, 0.0),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1, 1.0),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
    "guidance_scale": (1, 1.0),
    "length_penalty": (1, 1.0),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0, 0.0),
    "typical_p": (1, 1.0),
}


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What a request gets where it says nothing. The default value of this class changes no request."""

    params: dict[str, int | float] = {}  # field of SamplingParams -> value
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that no output may contain
    not_honoured: tuple[str, ...] = ()  # keys of the file that would change results, and that this server does not honour


def read_generation_defaults(folder: str | Path) -> GenerationDefaults:
    """Read the defaults of the folder's generation_config.json. If the file does not exist, there are none.

    Raises CheckpointError, naming the key, for a value that no request could have.
    """
    path = Path(folder) / "generation_config.json"
    if not path.exists():
        return GenerationDefaults()
    c = read_json(path)
    params = {field: _number(c, key, field) for key, field in _NUMBERS.items() if c.has(key)}
    if not c.flag("do_sample", True):
        params["temperature"] = 0.0
    return GenerationDefaults(params=params, bad_words=_bad_words(c), not_honoured=_not_honoured(c))


def _number(c: ConfigReader, key: str, field: str) -> int | float:
    value, (low, high, _) = c.given[key], BOUNDS[field]
    low = max(low, 1) if key == "max_new_tokens" else low
    kind = int if key in _WHOLE else int | float
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        what = "a whole number" if key in _WHOLE else "a number"
        c.refuse(key, f"it must be {what} from {low:g} to {high:g}; {_REMEDY}")
    return value if key in _WHOLE else float(value)


def _bad_words(c: ConfigReader) -> tuple[tuple[int, ...], ...]:
    words = c.given.get("bad_words_ids") or []
    if not isinstance(words, list) or not all(isinstance(word, list) and word and _are_ids(word) for word in words):
        c.refuse("bad_words_ids", f"it must be a list of lists of token ids; {_REMEDY}")
    if any(len(word) > MAX_BAD_WORD_TOKENS for word in words):
        c.refuse("bad_words_ids", f"each list must have at most {MAX_BAD_WORD_TOKENS} token ids; {_REMEDY}")
    suppressed = c.given.get("suppress_tokens") or []
    if not isinstance(suppressed, list) or not _are_ids(suppressed):
        c.refuse("suppress_tokens", f"it must be a list of token ids; {_REMEDY}")
    found = [*map(tuple, words), *((token,) for token in suppressed)]
    if len(found) > MAX_BAD_WORDS:
        c.refuse("suppress_tokens", f"with bad_words_ids it must have at most {MAX_BAD_WORDS} entries; {_REMEDY}")
    return tuple(dict.fromkeys(found))


def _are_ids(ids: list[Any]) -> bool:
    return all(type(token) is int and token >= 0 for token in ids)


def _not_honoured(c: ConfigReader) -> tuple[str, ...]:
    asked = {key: value for key, value in c.given.items() if value is not None and value is not False and value not in ([], {})}
    return tuple(
        key
        for key, value in asked.items()
        if key not in _READ and key not in _HARMLESS and not key.startswith("_") and value not in _NEUTRAL.get(key, ())
    )
