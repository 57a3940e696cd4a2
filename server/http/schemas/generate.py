"""POST /v1/generate: Tidegate's own request and answer, tokens beside text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from engine.errors import InvalidRequest
from server.http.schemas.common import SamplingFields, TokenIds, bounded

MAX_DEADLINE_MS = 24 * 3600 * 1000
ClientId = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:@/=+-]+$")]


class GenerateRequest(SamplingFields):
    """One prompt, as text or as token ids."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["prompt"]}, {"required": ["prompt_token_ids"]}],
            "examples": [{"prompt": "The tide comes in", "max_tokens": 16, "temperature": 0.0}],
        }
    )

    prompt: Annotated[str, Field(min_length=1, description="The prompt as text; or give prompt_token_ids.")] | None = None
    prompt_token_ids: TokenIds | None = Field(default=None, description="The prompt as token ids, taken as they are.")
    max_tokens: Annotated[int | None, bounded("max_tokens", "Tokens to generate at most; 16 if left out.")] = None
    logprobs: Annotated[
        int | None, bounded("logprobs", "Report log-probabilities, with this many alternatives beside each chosen token.")
    ] = None
    model: Annotated[str | None, Field(max_length=256, description="May be left out: the model that this server has.")] = None
    deadline_ms: Annotated[
        int | None, Field(ge=1, le=MAX_DEADLINE_MS, description="Give up, with status 408, after this many milliseconds.")
    ] = None
    cache: Annotated[
        Literal["auto", "off"] | None, Field(description="Whether a stored answer to the same request may be given.")
    ] = None
    request_id: Annotated[ClientId | None, Field(description="Your own id of this request; echoed in the answer.")] = None

    @model_validator(mode="after")
    def _one_prompt(self) -> GenerateRequest:
        if self.prompt is None and self.prompt_token_ids is None:
            raise InvalidRequest("prompt is required (or prompt_token_ids)", param="prompt")
        if self.prompt is not None and self.prompt_token_ids is not None:
            raise InvalidRequest("give prompt or prompt_token_ids, not both", param="prompt_token_ids")
        return self

    @property
    def client_names(self) -> dict[str, str]:
        """See `GenerationRequest.client_names`."""
        return {} if self.prompt is not None else {"prompt": "prompt_token_ids"}

    @property
    def text_or_tokens(self) -> str | list[int]:
        return self.prompt if self.prompt is not None else list(self.prompt_token_ids or ())


class TopToken(BaseModel):
    token_id: int
    text: str
    logprob: float


class TokenInfo(BaseModel):
    """Log-probability of the token at one position, its rank (1 is the likeliest), and the likeliest alternatives."""

    token_id: int
    text: str
    logprob: float
    rank: int
    top: list[TopToken]


class GenerateOutput(BaseModel):
    index: int
    text: str
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = Field(default=None, description="The stop string or token that ended it.")
    logprobs: list[TokenInfo] | None = None
    prompt_logprobs: list[TokenInfo | None] | None = Field(default=None, description="With the first output only.")


class GenerateUsage(BaseModel):
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class GenerateTiming(BaseModel):
    """Milliseconds since admission; queue_ms is the wait before the first step."""

    queue_ms: float
    ttft_ms: float
    total_ms: float


class GenerateResponse(BaseModel):
    """With `stream`, events carry {id, index, text, token_ids}; the last one has finish_reason, usage, timing; then [DONE]."""

    id: str
    request_id: str | None = None
    model: str
    outputs: list[GenerateOutput]
    usage: GenerateUsage
    timing: GenerateTiming
    cache: Literal["miss", "hit", "coalesced", "off"]
