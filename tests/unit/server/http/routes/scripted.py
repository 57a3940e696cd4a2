"""Defines a service that yields the chunks and errors that a test has scripted, for tests of the routes."""

from __future__ import annotations

import asyncio

from engine.errors import UnknownModel
from engine.models.generation import GenerationDefaults
from engine.request import CachedTokens
from server.engines.base import EngineHealth
from server.service.types import Chunk, Ending, Identity, Timing, Usage


class ScriptedService:
    """A service whose generate() runs through `script` in each call: it yields each Chunk, raises each exception, and sleeps for
    each number of seconds. An Ending follows."""

    model_name = "tiny"
    max_model_len = 100
    defaults = GenerationDefaults()
    anonymous = Identity()

    def __init__(self, *script, ready=True):
        self.script = script
        self.requests = []
        self.conversations = []
        self.closed = []  # ids of the requests whose generate() has ended or was closed
        self.engine_health = EngineHealth(ready=ready, started=ready, reason=None if ready else "the engine is loading")

    async def generate(self, request, identity, *, transport="http"):
        self.requests.append(request)
        num_tokens = 0
        try:
            if request.model not in (None, self.model_name):
                raise UnknownModel(f"there is no model {request.model!r}", param="model")
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, Chunk):
                    num_tokens += len(step.token_ids)
                    yield step
                else:
                    await asyncio.sleep(step)
            yield Ending(
                usage=Usage(prompt_tokens=3, cached=CachedTokens(host=1), completion_tokens=num_tokens),
                timing=Timing(queue_ms=0.5, ttft_ms=1.5, total_ms=2.5),
            )
        finally:
            self.closed.append(request.request_id)

    def check_logprobs(self, params, *, prompt_tokens, outputs):
        self.checked = (params.prompt_logprobs, prompt_tokens, outputs)

    async def chat_tokens(self, conversation, *, model=None, add_special_tokens=False, as_prompt=False, keep=None):
        self.conversations.append(conversation)
        return [*([0] if add_special_tokens else []), *range(10 + len(conversation.messages))][-(keep or 0) :]

    async def tokenize(self, text, *, model=None, add_special_tokens=True, as_prompt=False, keep=None):
        return [*([0] if add_special_tokens else []), *(ord(c) for c in text)][-(keep or 0) :]

    async def detokenize(self, token_ids, *, model=None, skip_special_tokens=False):
        return "".join(chr(t % 0xD800) for t in token_ids)

    async def prompt_text(self, text, token_ids, *, skip_special_tokens):
        """Return `text`, or the characters of `token_ids`. Token 0 is special, and has no text."""
        offsets = [sum(t > 0 for t in token_ids[:i]) for i in range(len(token_ids))]
        return (await self.detokenize([t for t in token_ids if t]) if text is None else text), offsets

    def kept_of(self, truncate, max_tokens):
        return self.max_model_len - max_tokens if truncate == -1 else truncate

    def token_text(self, token):
        return chr(token)

    def token_bytes(self, token):
        return chr(token).encode()

    def models(self):
        return []

    def health(self):
        return self.engine_health


def letters(text, *, index=0, finish="length", logprobs=None, prompt_logprobs=None):
    """Make one Chunk for each character of `text`. The first Chunk has the prompt's log-probabilities, the last a finish reason.

    `logprobs` is a function from a token to its TokenLogprobs.
    """
    last = len(text) - 1
    return [
        Chunk(
            index=index,
            text=character,
            token_ids=[ord(character)],
            finish_reason=finish if i == last else None,
            logprobs=None if logprobs is None else [logprobs(ord(character))],
            prompt_logprobs=None if i else prompt_logprobs,
            text_offsets=None if logprobs is None else [i],
        )
        for i, character in enumerate(text)
    ]
