"""A service that says what a test tells it to, for tests of what the routes make of it."""

from __future__ import annotations

import asyncio

from engine.errors import UnknownModel
from server.engines.base import EngineHealth
from server.service.types import Chunk, Ending, Timing, Usage


class ScriptedService:
    """Each generate() plays `script`: Chunks as they are, exceptions raised, numbers slept; then an Ending."""

    model_name = "tiny"
    max_model_len = 100

    def __init__(self, *script, ready=True):
        self.script = script
        self.requests = []
        self.closed = []  # request ids whose generator was closed or finished
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
                    yield Chunk(**{name: getattr(step, name) for name in step.__struct_fields__})
                else:
                    await asyncio.sleep(step)
            yield Ending(
                usage=Usage(prompt_tokens=3, cached_tokens=1, completion_tokens=num_tokens),
                timing=Timing(queue_ms=0.5, ttft_ms=1.5, total_ms=2.5),
            )
        finally:
            self.closed.append(request.request_id)

    def check_logprobs(self, params, *, prompt_tokens, outputs):
        self.checked = (params.prompt_logprobs, prompt_tokens, outputs)

    async def chat_tokens(self, messages):
        return list(range(10 + len(messages)))

    async def tokenize(self, text, *, model=None, add_special_tokens=True, as_prompt=False):
        return [*([0] if add_special_tokens else []), *(ord(c) for c in text)]

    async def detokenize(self, token_ids, *, model=None, as_prompt=False):
        return "".join(chr(t % 0xD800) for t in token_ids)

    def token_text(self, token):
        return chr(token)

    def token_bytes(self, token):
        return chr(token).encode()

    def models(self):
        return []

    def health(self):
        return self.engine_health


def letters(text, *, index=0, finish="length", logprobs=None):
    """A chunk for each character of `text`, the last with a finish reason."""
    chunks = [Chunk(index=index, text=c, token_ids=[ord(c)]) for c in text]
    chunks[-1].finish_reason = finish
    if logprobs is not None:
        for chunk in chunks:
            chunk.logprobs = [logprobs(chunk.token_ids[0])]
    return chunks
