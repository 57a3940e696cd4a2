"""Defines the bodies and answers of the small routes (tokens, models, health, version), and the error that every route can
answer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from server.http.schemas.common import Schema, TokenIds

ModelChoice = Annotated[str | None, Field(max_length=256, description="Name of a model in /v1/models. May be left out.")]


class TokenizeBody(Schema):
    """The body of POST /tokenize."""

    model: ModelChoice = None
    prompt: Annotated[str, Field(description="Text to turn into token ids.", examples=["Hello"])]
    add_special_tokens: Annotated[
        bool | None, Field(description="Add the special tokens that a prompt gets, such as its first token; true if left out.")
    ] = None


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


class ErrorDetail(BaseModel):
    type: str
    code: str
    message: str
    param: str | None


class ErrorResponse(BaseModel):
    """The answer of every route to a request that it refuses or cannot complete."""

    error: ErrorDetail
