"""Writes to the log what the model's files say about stopping and sampling, since it decides about every answer."""

from __future__ import annotations

import logging

from engine.models.generation import GenerationDefaults
from server.text.tokenizer import Tokenizer

log = logging.getLogger("tidegate.worker")


def report_model(text: Tokenizer, defaults: GenerationDefaults, eos_token_ids: tuple[int, ...]) -> None:
    """Log the tokens that end an output, the sampling defaults, and what generation_config.json asks for in vain.

    `eos_token_ids` are the engine's, from config.json and generation_config.json.
    """
    ends = dict.fromkeys(eos_token_ids, "config")
    ends |= {token: f"{ends[token]}, {files}" if token in ends else files for token, files in text.end_tokens.items()}
    named = [f"{text.token_text(token)!r} ({token}: {files})" for token, files in sorted(ends.items())]
    log.info("an output ends at these tokens: %s", ", ".join(named) or "none", extra={"end_token_ids": sorted(ends)})
    if defaults.params:
        shown = ", ".join(f"{name} {value:g}" for name, value in defaults.params.items())
        log.info(
            "requests that say nothing get the defaults of the model's generation_config.json: %s; set generation_config to off "
            "for this server's own",
            shown,
            extra={"default_sampling_params": defaults.params},
        )
    if defaults.bad_words:
        log.info("generation_config.json forbids %d token sequences in all outputs", len(defaults.bad_words))
    if defaults.not_honoured:
        log.warning(
            "generation_config.json asks for what this server does not do, so answers may differ from its author's: %s",
            ", ".join(defaults.not_honoured),
            extra={"keys": list(defaults.not_honoured)},
        )
