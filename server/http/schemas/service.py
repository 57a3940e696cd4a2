"""Defines the bodies and answers of the small routes (tokens, models, health, version, cache), and the error that every route can
answer."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from engine.errors import InvalidRequest
from engine.messages import TIER_NAMES, TierName
from server.http.schemas.common import Schema, TokenIds
from server.http.schemas.messages import ChatFields

_ONLY_WITH_MESSAGES = ("continue_final_message", "chat_template", "chat_template_kwargs", "documents", "reasoning_effort")
ModelChoice = Annotated[str | None, Field(max_length=256, description="Name of a model in /v1/models. May be left out.")]


_SPECIAL = "Add the special tokens that a prompt gets, such as its first token; true if left out"


class TokenizeTextBody(Schema):
    """The request of gRPC's Tokenize."""

    model: ModelChoice = None
    prompt: str
    add_special_tokens: bool | None = None


class TokenizeBody(ChatFields):
    """The body of POST /tokenize: a prompt, or messages that the model's chat template renders to a prompt."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "tools": ([],),
        "mm_processor_kwargs": ({},),
        "return_token_strs": (False,),
    }

    model: ModelChoice = None
    prompt: Annotated[
        str | None, Field(description="Text to turn into token ids. Give either prompt or messages.", examples=["Hello"])
    ] = None
    add_special_tokens: Annotated[bool | None, Field(description=f"{_SPECIAL}; with messages, false if left out.")] = None

    @model_validator(mode="after")
    def _one_input(self) -> TokenizeBody:
        if self.prompt is None and self.messages is None:
            raise InvalidRequest("prompt is required, or messages", param="prompt")
        if self.prompt is not None:
            for name in ("messages", *_ONLY_WITH_MESSAGES):
                if getattr(self, name):
                    raise InvalidRequest(f"{name} may not be given with prompt", param=name)
        return self


class TokenizeResponse(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeBody(Schema):
    """The body of POST /detokenize."""

    model: ModelChoice = None
    tokens: Annotated[TokenIds, Field(description="Token ids to turn into text.", examples=[[1, 2, 3]])]
    skip_special_tokens: Annotated[bool | None, Field(description="Leave the text of special tokens out; false if left out.")] = (
        None
    )


class DetokenizeResponse(BaseModel):
    prompt: str


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    default_sampling_params: dict[str, float] = Field(
        description="What a request gets where it says nothing, from the model's generation_config.json."
    )


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok", "unavailable"]
    reason: str | None = None


class Version(BaseModel):
    version: str


class CacheResetBody(Schema):
    """The body of POST /cache/reset, which may be left out."""

    tiers: Annotated[
        list[TierName] | None,
        Field(min_length=1, max_length=len(TIER_NAMES), description="The tiers to reset. All, if left out.", examples=[["gpu"]]),
    ] = None


class CacheResetResponse(BaseModel):
    forgotten_blocks: dict[TierName, int] = Field(
        description="How many blocks each of the tiers held, of all engines together. A tier that is off held none."
    )


class ErrorDetail(BaseModel):
    type: str
    code: str
    message: str
    param: str | None


class ErrorResponse(BaseModel):
    """The answer of every route to a request that it refuses or cannot complete."""

    error: ErrorDetail
