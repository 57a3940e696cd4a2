"""Decides what happens to fields of a request that its route does not have. No difference is silent.

the field asks for nothing (null, false, "", [], {})         it is left out
the field is known and cannot be done (KNOWN)                refused by name, except with values that change nothing
the field is unknown                                         refused by name, with the nearest name; or, if strict_fields is
                                                             off, left out and reported in the answer's headers and the log
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import PydanticCustomError

from engine.errors import UnsupportedField

UNKNOWN_FIELD = "unknown_field"  # type of the PydanticCustomError for an unknown field; `server.errors` makes a refusal of it
_MAX_NAME = 1024  # characters kept of an unknown field's name
MAX_REPORTED = 32  # most ignored fields that are reported by name

# Fields of OpenAI, vLLM, SGLang and others that no route has -> values that change nothing. Empty values change nothing either;
# false does unless it is listed. The order matters: of several fields in a request, the refusal names the first one here.
KNOWN: dict[str, tuple[Any, ...]] = {
    "tools": (),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "functions": (),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "json_schema": (),
    "structural_tag": (),
    "regex": (),
    "ebnf": (),
    "grammar": (),
    "audio": (),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "reasoning": (),
    "reasoning_effort": (),
    "thinking": (),
    "enable_thinking": (),
    "thinking_token_budget": (),
    "include_reasoning": (True,),
    "separate_reasoning": (True,),
    "stream_reasoning": (True,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "suffix": (),
    "prompt_embeds": (),
    "add_special_tokens": (True,),
    "detokenize": (True,),
    "cache_salt": (),
    "mm_processor_kwargs": (),
    "logits_processors": (),
    "vllm_xargs": (),
    "kv_transfer_params": (),
    "lora_path": (),
    "session_params": (),
    "return_tokens_as_token_ids": (False,),
    "return_hidden_states": (False,),
    "no_stop_trim": (False,),
    "stop_regex": (),
    "typical_p": (1, 1.0),
    "tfs_z": (1, 1.0),
    "top_a": (0, 0.0),
    "mirostat": (0,),
    "dry_multiplier": (0, 0.0),
    "xtc_probability": (0, 0.0),
}

# What to use instead of fields that are often sent to the wrong route or under another server's name.
_INSTEAD = {
    "service_tier": "send slo_class",
    "enable_thinking": "send chat_template_kwargs to /v1/chat/completions",
    "thinking": "send chat_template_kwargs to /v1/chat/completions",
    "messages": "send messages to /v1/chat/completions",
    "prompt": "send messages here, or prompt to /v1/completions",
    "prompt_token_ids": "send prompt with token ids to /v1/completions, or prompt_token_ids to /v1/generate",
    "input": "send prompt to /v1/completions, or messages to /v1/chat/completions",
    "inputs": "send prompt",
    "echo": "only /v1/completions has it",
    "top_logprobs": "send logprobs with the number of alternatives",
    "max_new_tokens": "did you mean max_tokens?",
    "max_length": "did you mean max_tokens?",
    "n_predict": "did you mean max_tokens?",
    "num_predict": "did you mean max_tokens?",
    "max_completion_tokens": "did you mean max_tokens?",
    "stop_sequences": "did you mean stop?",
    "repeat_penalty": "did you mean repetition_penalty?",
    "random_seed": "did you mean seed?",
    "num_return_sequences": "did you mean n?",
}


class Ignored:
    """Collects the unknown fields that were left out of one request, since strict_fields is off. It is pydantic's `context`."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def add(self, names: Iterable[str]) -> None:
        for name in names:
            if len(self._names) < MAX_REPORTED:
                self._names[name.encode("ascii", "replace").decode()[:64]] = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names, without characters that a header may not have."""
        return tuple("".join(c if c.isprintable() and c != "," else "?" for c in name) for name in self._names)


def asks_for_nothing(value: Any) -> bool:
    return value is None or value is False or _is_empty(value)


def without_unsupported(value: dict[Any, Any], table: Mapping[str, tuple[Any, ...]], *, path: str = "") -> dict[Any, Any]:
    """Return `value` without the fields that `table` names. Raises UnsupportedField if such a field has a value that is not empty
    and not one of the values that the table lists for it, which change nothing."""
    found = value.keys() & table.keys()
    if not found:
        return value
    for name in (name for name in table if name in found):
        given = value[name]
        if given is not None and not _is_empty(given) and not any(type(given) is type(v) and given == v for v in table[name]):
            raise UnsupportedField(
                f"this server does not support {path}{name}: {_INSTEAD.get(name, 'leave it out')}", param=f"{path}{name}"
            )
    return {name: given for name, given in value.items() if name not in found}


def without_unknown(value: dict[Any, Any], fields: Mapping[str, Any], where: str, ignored: Ignored | None) -> dict[Any, Any]:
    """Return `value` without the keys that are not in `fields`.

    If `ignored` is None, the first such key that asks for something raises a PydanticCustomError, to which pydantic adds the
    object's path. Otherwise the keys that ask for something are added to `ignored`, behind `where`, the path of the object.
    """
    unknown = value.keys() - fields.keys()
    if not unknown:
        return value
    asking = [name for name in value if name in unknown and not asks_for_nothing(value[name])]
    if asking and ignored is None:
        name = str(asking[0])[:_MAX_NAME].encode("utf-8", "replace").decode()
        raise PydanticCustomError(UNKNOWN_FIELD, "unknown field", {"name": name, "hint": _hint(name, fields)})
    if ignored is not None:
        ignored.add(where + str(name) for name in asking[:MAX_REPORTED])
    return {name: given for name, given in value.items() if name not in unknown}


def _is_empty(value: Any) -> bool:
    return isinstance(value, str | list | dict) and not value


def _hint(name: str, fields: Mapping[str, Any]) -> str:
    """Return what a client may have meant by `name`, as the end of a sentence; "" if nothing is near."""
    instead = _INSTEAD.get(name)
    if instead is not None and not (instead.startswith("did you mean") and instead[13:-1] not in fields):
        return f": {instead}"
    near = difflib.get_close_matches(name[:64].lower().replace("-", "_"), fields, n=1, cutoff=0.75)
    return f": did you mean {near[0]}?" if near else ": leave it out"
