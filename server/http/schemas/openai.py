"""Defines OpenAI's completions and chat completions: supported fields, fields that are refused by name, and the answers.

Besides OpenAI's fields there are those of `SamplingFields`, which the openai client sends through `extra_body`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, Discriminator, Field, StringConstraints, Tag, model_validator

from engine.errors import InvalidRequest
from engine.request import SamplingParams
from engine.slo import SloName
from server.http.schemas.common import MAX_PROMPTS, SamplingFields, Schema, TokenIds, at_most, bounded
from server.http.schemas.messages import ChatFields, Messages
from server.service.types import GenerationRequest

Text = Annotated[str, StringConstraints(min_length=1)]
Label = Annotated[str, StringConstraints(max_length=512)]
ModelName = Annotated[str | None, Field(max_length=256, description="Name of a model in /v1/models. May be left out.")]
Tier = Literal["default", "flex", "priority"]
_TIERS: dict[str, SloName] = {"flex": "batch", "priority": "interactive"}
_METADATA = 16  # OpenAI's limit on the number of labels


class EventOptions(NamedTuple):
    """What the events of a stream have beside the text."""

    usage: bool = False  # the last event has the usage
    usage_so_far: bool = False  # each event has the usage so far
    obfuscation: bool = False


class StreamOptions(Schema):
    WHERE: ClassVar[str] = "stream_options."

    include_usage: Annotated[bool | None, Field(description="Send a last event with the usage.")] = None
    continuous_usage_stats: Annotated[bool | None, Field(description="Send the usage so far in each event.")] = None
    include_obfuscation: Annotated[
        bool | None, Field(description="Add a field `obfuscation` to each event, which hides the length of its text.")
    ] = None


class OpenAIFields(SamplingFields):
    """Fields that completions and chat completions have in common."""

    model: ModelName = None
    stream_options: StreamOptions | None = None
    service_tier: Annotated[
        Literal["auto", Tier] | None,
        Field(
            description="OpenAI's name for a latency class. flex: slo_class batch; priority: slo_class interactive; auto and "
            "default: no class. The answer repeats the tier."
        ),
    ] = None
    user: Annotated[Label | None, Field(description="A label of your own. It has no effect.")] = None
    safety_identifier: Annotated[Label | None, Field(description="A label of your own. It has no effect.")] = None
    prompt_cache_key: Annotated[
        Label | None, Field(description="A label of requests with a common prefix. It has no effect: prefixes are always shared.")
    ] = None
    prompt_cache_options: Annotated[
        dict[str, Any] | None, Field(description="OpenAI's options of its prompt cache. They have no effect.")
    ] = None
    metadata: Annotated[
        Annotated[dict[Label, Label], at_most(_METADATA), Field(max_length=_METADATA)] | None,
        Field(description="Labels of your own. They have no effect."),
    ] = None

    @property
    def event_options(self) -> EventOptions:
        options = self.stream_options or StreamOptions()
        return EventOptions(
            usage=bool(options.include_usage),
            usage_so_far=bool(options.continuous_usage_stats),
            obfuscation=bool(options.include_obfuscation),
        )

    @property
    def named_class(self) -> SloName | None:
        return super().named_class or _TIERS.get(self.service_tier or "")

    @property
    def tier(self) -> dict[str, str]:
        """Return the field `service_tier` of the answer, which only a request with that field gets."""
        return {} if self.service_tier is None else {"service_tier": self.service_tier.replace("auto", "default")}

    def request_of(self, request_id: str, prompt: str | list[int], params: SamplingParams, **more: Any) -> GenerationRequest:
        if self.service_tier in _TIERS:
            more["client_names"] = {**more.get("client_names", {}), "slo_class": "service_tier"}
        return super().request_of(request_id, prompt, params, **more)

    @model_validator(mode="after")
    def _one_class(self) -> OpenAIFields:
        tier = _TIERS.get(self.service_tier or "")
        if tier is not None and super().named_class not in (None, tier):
            raise InvalidRequest(
                f"service_tier is {self.service_tier}, which stands for slo_class {tier}, and slo_class is {self.slo_class}: "
                "give one of the two",
                param="service_tier",
            )
        return self

    @model_validator(mode="after")
    def _options_need_stream(self) -> OpenAIFields:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options may only be given with stream true", param="stream_options")
        return self


def _prompt_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "#text"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    if isinstance(first, list):
        return "#token_lists"
    return "#tokens" if isinstance(first, int | float) else "#texts"


Prompt = Annotated[
    Annotated[Text, Tag("#text")]
    | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS), Tag("#texts")]
    | Annotated[TokenIds, Tag("#tokens")]
    | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS), Tag("#token_lists")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_kind",
        custom_error_message="must be a string, a list of strings, a list of token ids, or a list of lists of token ids",
    ),
]


class CompletionBody(OpenAIFields):
    """The body of POST /v1/completions."""

    prompt: Annotated[Prompt, Field(description="One prompt or several, as text or as token ids.", examples=["Once upon a time"])]
    max_tokens: Annotated[
        int | None,
        bounded(
            "max_tokens",
            "Largest number of tokens to generate for each choice. If left out, the model's default, or 16, or what is left of "
            "the context. 0 with echo and logprobs scores the prompt.",
        ),
    ] = None
    logprobs: Annotated[
        int | None, bounded("logprobs", "Report the log-probability of each token, with this many alternatives.")
    ] = None
    echo: Annotated[
        bool | None,
        Field(
            description="Begin each choice with its prompt. With logprobs, the first choice of each prompt also has the "
            "log-probabilities of the prompt."
        ),
    ] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Return the prompts of the body as a list. Each prompt is a text or a list of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [list(self.prompt)]
        return list(self.prompt)


class ChatBody(ChatFields, OpenAIFields):
    """The body of POST /v1/chat/completions."""

    messages: Messages
    max_tokens: Annotated[
        int | None, bounded("max_tokens", "Largest number of tokens to generate; what is left of the context if left out.")
    ] = None
    max_completion_tokens: Annotated[int | None, bounded("max_tokens", "A newer name for max_tokens. Give one of the two.")] = (
        None
    )
    logprobs: Annotated[bool | None, Field(description="Report the log-probability of each token.")] = None
    top_logprobs: Annotated[
        int | None, bounded("logprobs", "Number of alternatives to report for each token. Requires logprobs true.")
    ] = None

    @model_validator(mode="after")
    def _agree(self) -> ChatBody:
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise InvalidRequest("max_tokens and max_completion_tokens differ: give one of them", param="max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs may only be given with logprobs true", param="top_logprobs")
        return self

    @property
    def client_names(self) -> dict[str, str]:
        """Map a field name of GenerationRequest to the name that the field has in the body, where the two differ. Error messages
        use the name in the body."""
        names = {"prompt": "messages", "logprobs": "top_logprobs"}
        return names if self.max_completion_tokens is None else {**names, "max_tokens": "max_completion_tokens"}

    @property
    def output_limit(self) -> int | None:
        """Return the largest number of tokens to generate, from `max_completion_tokens` or `max_tokens`; None if neither is
        set."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class OpenAIUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    prompt_cache_hit_tokens: int = Field(description="As cached_tokens, under the name that DeepSeek's API has for it.")
    prompt_cache_miss_tokens: int = Field(description="The other tokens of the prompt, as DeepSeek's API counts them.")


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = Field(
        default=None, description="Only in the first choice of each prompt."
    )
    token_ids: list[int] | None = Field(default=None, description="Only if the request sets return_token_ids.")
    prompt_token_ids: list[int] | None = Field(default=None, description="Only if the request sets return_token_ids.")


class CompletionResponse(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    service_tier: Tier | None = Field(default=None, description="Only if the request has the field.")
    choices: list[CompletionChoice]
    usage: OpenAIUsage


class ChatTopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(ChatTopLogprob):
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = None
    token_ids: list[int] | None = Field(default=None, description="Only if the request sets return_token_ids.")


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    service_tier: Tier | None = Field(default=None, description="Only if the request has the field.")
    choices: list[ChatChoice]
    usage: OpenAIUsage
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    prompt_token_ids: list[int] | None = Field(default=None, description="Only if the request sets return_token_ids.")
