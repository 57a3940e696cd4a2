"""The small routes: tokens, models, health, version; and the error that every route can answer with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from server.http.schemas.common import Schema, TokenIds

ModelChoice = Annotated[str | None, Field(max_length=256, description="May be left out: the model that this server has.")]


class TokenizeRequest(Schema):
    model: ModelChoice = None
    prompt: Annotated[str, Field(description="Text to turn into token ids.", examples=["Hello"])]
    add_special_tokens: Annotated[bool | None, Field(description="As before a prompt; true if left out.")] = None


class TokenizeResponse(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(Schema):
    model: ModelChoice = None
    tokens: Annotated[TokenIds, Field(description="Token ids to turn into text.", examples=[[1, 2, 3]])]


class DetokenizeResponse(BaseModel):
    prompt: str


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok", "unavailable"]
    reason: str | None = None


class Version(BaseModel):
    version: str


class ErrorDetail(BaseModel):
    type: str
    code: str
    message: str
    param: str | None


class ErrorResponse(BaseModel):
    """What every route answers where it cannot do what was asked."""

    error: ErrorDetail
