"""Defines the body and the answer of POST /v1/generate, Tidegate's own route, which has token ids beside text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from engine.errors import InvalidRequest
from engine.models.generation import GenerationDefaults
from server.errors import CLIENT_ID
from server.http.schemas.common import SamplingFields, TokenIds, bounded
from server.service.types import GenerationRequest

MAX_DEADLINE_MS = 24 * 3600 * 1000
ClientId = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=CLIENT_ID)]


class GenerateBody(SamplingFields):
    """A prompt, as text or as token ids, and how to continue it."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["prompt"]}, {"required": ["prompt_token_ids"]}],
            "examples": [{"prompt": "The tide comes in", "max_tokens": 16, "temperature": 0.0}],
        }
    )

    prompt: Annotated[
        Annotated[str, Field(min_length=1)] | None,
        Field(description="The prompt as text. Give either prompt or prompt_token_ids."),
    ] = None
    prompt_token_ids: TokenIds | None = Field(default=None, description="The prompt as token ids, used without change.")
    max_tokens: Annotated[
        int | None,
        bounded(
            "max_tokens",
            "Largest number of tokens to generate. If left out, the model's default, or 16, or what is left of the context.",
        ),
    ] = None
    logprobs: Annotated[
        int | None, bounded("logprobs", "Report the log-probability of each token, with this many alternatives.")
    ] = None
    model: Annotated[str | None, Field(max_length=256, description="Name of a model in /v1/models. May be left out.")] = None
    deadline_ms: Annotated[
        int | None, Field(ge=1, le=MAX_DEADLINE_MS, description="Milliseconds after which the request ends with status 408.")
    ] = None
    cache: Annotated[
        Literal["auto", "off"] | None, Field(description="auto: an answer that was stored for an equal request may be used.")
    ] = None
    request_id: Annotated[ClientId | None, Field(description="Your own id of the request. The answer repeats it.")] = None

    @model_validator(mode="after")
    def _one_prompt(self) -> GenerateBody:
        if self.prompt is None and self.prompt_token_ids is None:
            raise InvalidRequest("prompt is missing: give prompt or prompt_token_ids", param="prompt")
        if self.prompt is not None and self.prompt_token_ids is not None:
            raise InvalidRequest("give prompt or prompt_token_ids, not both", param="prompt_token_ids")
        return self

    @property
    def client_names(self) -> dict[str, str]:
        """Map a field name of GenerationRequest to the name that the field has in the body, where the two differ. Error messages
        use the name in the body."""
        return {} if self.prompt is not None else {"prompt": "prompt_token_ids"}

    def generation_request(
        self, request_id: str, defaults: GenerationDefaults, *, deadline_s: float | None = None
    ) -> GenerationRequest:
        """Make the service's request for this body. `defaults` are the model's. `deadline_s` is the transport's own deadline, in
        seconds, or None; if the body has a deadline too, the earlier one counts.

        Raises InvalidRequest for fields that contradict each other.
        """
        deadlines = [] if deadline_s is None else [deadline_s]
        if self.deadline_ms is not None:
            deadlines.append(self.deadline_ms / 1000)
        return self.request_of(
            request_id,
            self.prompt if self.prompt is not None else self.prompt_token_ids or [],
            self.sampling(defaults, max_tokens=self.max_tokens, logprobs=self.logprobs),
            fits_max_tokens=self.max_tokens is None,
            deadline_s=min(deadlines, default=None),
            client_names=self.client_names,
        )


class TopToken(BaseModel):
    token_id: int
    text: str
    logprob: float


class TokenInfo(BaseModel):
    """The token at one position: its log-probability, its rank (1 is the most probable token) and the most probable tokens."""

    token_id: int
    text: str
    logprob: float
    rank: int
    top: list[TopToken]


class GeneratedOutput(BaseModel):
    index: int
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = Field(
        default=None, description="The stop string or the token of stop_token_ids that ended the output."
    )
    logprobs: list[TokenInfo] | None = None
    prompt_logprobs: list[TokenInfo | None] | None = Field(
        default=None, description="Only in the first output, since all outputs share the prompt."
    )


class CachedTokensByTier(BaseModel):
    """The parts of cached_tokens by where they were: on the device, or loaded from host memory or disk for this request."""

    gpu: int
    host: int
    disk: int


class GenerateUsage(BaseModel):
    prompt_tokens: int
    cached_tokens: int
    cached_tokens_by_tier: CachedTokensByTier
    completion_tokens: int


class GenerateTiming(BaseModel):
    """Milliseconds from the request's arrival to the first token and to the end. queue_ms is the wait before its first step."""

    queue_ms: float
    ttft_ms: float
    total_ms: float


class GenerateResponse(BaseModel):
    """The whole answer. With `stream`, each event has {id, index, text, token_ids}, the last event also has finish_reason,
    usage and timing, and [DONE] follows."""

    id: str
    request_id: str | None = None
    model: str
    prompt_token_ids: list[int] | None = Field(default=None, description="Only if the request sets return_token_ids.")
    outputs: list[GeneratedOutput]
    usage: GenerateUsage
    timing: GenerateTiming
    cache: Literal["miss", "hit", "coalesced", "off"]
