"""Defines the base of all request schemas: strict parsing, and sampling fields with their ranges from `engine.request.BOUNDS`.

HTTP and gRPC validate requests with the same schemas. Strict means: "3" is not a number, 1 is not a boolean, and an unknown
field is an error. Every optional field may also be null, with the same meaning, because OpenAI clients send it so.

A body within the size limit can hold a million faults, and pydantic would spend seconds collecting all of them. So long lists
stop at the first fault (`fail_fast`), and unknown keys are removed or refused before pydantic reads the others.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from engine.models.generation import GenerationDefaults
from engine.request import BOUNDS, MAX_ALLOWED_IDS, MAX_LOGIT_BIAS, MAX_STOP_IDS, SamplingParams
from engine.slo import SloName
from server.errors import TOKEN_ID
from server.http.schemas.fields import KNOWN, without_unknown, without_unsupported
from server.service.types import GenerationRequest

# Upper bounds of the limits that an operator can set in `Settings`. The service checks a request against the limits that are set.
MAX_N = 128  # most outputs of one prompt
MAX_STOP = 1024  # most stop strings of one request
MAX_STOP_CHARS = 65536  # most characters of one stop string
MAX_PROMPTS = 128  # most prompts of one request of POST /v1/completions
MAX_PROMPT_TOKENS = 1 << 21  # more than any model's context; the limit on the size of the body is usually reached before
MAX_WORDS = 256  # most bad words of one request
MAX_WORD_CHARS = 256  # most characters of one bad word
TOKEN_ID_MAX = 2**31 - 1


def bounded(name: str, description: str = "", **more: Any) -> Any:
    """Make a pydantic Field for a number in the closed range `BOUNDS[name]`. The default description is the one in `BOUNDS`."""
    low, high, about = BOUNDS[name]
    return Field(ge=low, le=high, description=description or about, **more)


TokenId = Annotated[int, Field(ge=0, le=TOKEN_ID_MAX)]
_SLICE = 1 << 14  # token ids that are validated without a pause: less than a millisecond


def _in_slices(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Validate a long list of token ids slice by slice. Pydantic would hold the interpreter lock for the whole list. It is needed
    only to name a fault."""
    if not isinstance(value, list) or not _SLICE < len(value) <= MAX_PROMPT_TOKENS:
        return validate(value)
    for start in range(0, len(value), _SLICE):
        piece = value[start : start + _SLICE]
        if set(map(type, piece)) != {int} or min(piece) < 0 or max(piece) > TOKEN_ID_MAX:
            return validate(value)
    return value


TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPT_TOKENS), WrapValidator(_in_slices)]
Word = Annotated[str, StringConstraints(min_length=1, max_length=MAX_WORD_CHARS)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]


def _stop_kind(value: Any) -> str | None:
    return "#text" if isinstance(value, str) else "#texts" if isinstance(value, list) else None


Stop = Annotated[
    Annotated[StopText, Tag("#text")] | Annotated[list[StopText], Field(fail_fast=True, max_length=MAX_STOP), Tag("#texts")],
    Discriminator(_stop_kind, custom_error_type="stop_kind", custom_error_message="must be a string or a list of strings"),
]
TokenKey = Annotated[str, StringConstraints(pattern=TOKEN_ID)]
Bias = Annotated[float, bounded("logit_bias", "Number that is added to the token's logit.")]


def at_most(num_keys: int) -> BeforeValidator:
    """Return a validator that refuses a dict with more than `num_keys` keys before pydantic validates any key. Pydantic's own
    max_length counts the keys only afterwards."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > num_keys:
            raise PydanticCustomError("too_many_keys", "must have at most {most} entries", {"most": num_keys})
        return value

    return BeforeValidator(check)


class Schema(BaseModel):
    """Base class of the schemas of request bodies and their parts."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=())

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {}  # field that the server knows and lacks -> values without effect
    WHERE: ClassVar[str] = ""  # path of the object in the body, before the names of its fields; [] is any item of a list

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_fields(cls, value: Any, info: ValidationInfo) -> Any:
        """Handle fields that the schema does not have, as `schemas.fields` describes. `info.context` is an Ignored or None."""
        if not isinstance(value, dict):
            return value
        return without_unknown(without_unsupported(value, cls.UNSUPPORTED), cls.model_fields, cls.WHERE, info.context)


_OWN = ("max_tokens", "logprobs", "logit_bias")  # fields that each route declares itself, or that are not a single number
_KINDS = get_type_hints(SamplingParams)
_NUMBERS = tuple(name for name in SamplingParams.__struct_fields__ if name in BOUNDS and name not in _OWN)
_PLAIN = (*_NUMBERS, "ignore_eos")
_fields: dict[str, Any] = {name: (Annotated[_KINDS[name] | None, bounded(name)], None) for name in _NUMBERS}
_Numbers: Any = create_model("_Numbers", __base__=Schema, **_fields)


class SamplingFields(_Numbers):  # type: ignore[misc]
    """How to sample tokens and when to stop. All generating routes have these fields."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.UNSUPPORTED = {name: values for name, values in KNOWN.items() if name not in cls.model_fields}

    n: Annotated[int | None, Field(ge=1, le=MAX_N, description="Number of outputs for each prompt.")] = None
    stop: Annotated[
        Stop | None,
        Field(
            description="One string or several. An output ends before the first of them that appears. They may contain special "
            "tokens.",
            examples=[["\n\n"]],
        ),
    ] = None
    include_stop_str_in_output: Annotated[
        bool | None, Field(description="Let an output end with the text of the stop string or stop token that ended it.")
    ] = None
    skip_special_tokens: Annotated[
        bool | None, Field(description="Leave the text of special tokens out of the outputs; true if left out.")
    ] = None
    spaces_between_special_tokens: Annotated[
        bool | None,
        Field(description="Whether the tokenizer may write a space between special tokens, if it is one that does."),
    ] = None
    stop_token_ids: Annotated[
        list[TokenId] | None, Field(max_length=MAX_STOP_IDS, description="Token ids that end an output.")
    ] = None
    ignore_eos: Annotated[bool | None, Field(description="Continue after the model's own end tokens.")] = None
    bad_words: Annotated[
        list[Word] | None,
        Field(fail_fast=True, max_length=MAX_WORDS, description="Texts that no output may contain, also after a space."),
    ] = None
    allowed_token_ids: Annotated[
        list[TokenId] | None,
        Field(fail_fast=True, min_length=1, max_length=MAX_ALLOWED_IDS, description="The only tokens that an output may have."),
    ] = None
    logit_bias: Annotated[
        Annotated[dict[TokenKey, Bias], at_most(MAX_LOGIT_BIAS), Field(max_length=MAX_LOGIT_BIAS)] | None,
        Field(description="Token id -> number that is added to the token's logit."),
    ] = None
    truncate_prompt_tokens: Annotated[
        int | None,
        Field(ge=-1, le=TOKEN_ID_MAX, description="Use this many last tokens of the prompt; -1: as many as the context allows."),
    ] = None
    return_token_ids: Annotated[bool | None, Field(description="Report the token ids of the prompt and the outputs.")] = None
    stream: Annotated[bool | None, Field(description="Send the answer as server-sent events while it is generated.")] = None
    priority: Annotated[int | None, bounded("priority", "Requests with a smaller number run earlier within their class.")] = None
    slo_class: Annotated[
        Literal[SloName, "default"] | None,
        Field(
            description="Latency class. interactive: the first token within 500 ms, and 50 ms between tokens; standard: 2 s and "
            "100 ms; batch: whenever there is room. A request that cannot have what its class promises is refused with 429. "
            "default, like a field that is left out, stands for the operator's choice."
        ),
    ] = None

    @property
    def num_outputs(self) -> int:
        return self.n or 1

    @property
    def named_class(self) -> SloName | None:
        """Return the latency class that the body names, or None."""
        return None if self.slo_class == "default" else self.slo_class

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, defaults: GenerationDefaults, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Make SamplingParams from the body's fields and, where the body says nothing, from `defaults`.

        Raises InvalidRequest for fields that contradict each other.
        """
        given = {**defaults.params, **{name: value for name in _PLAIN if (value := getattr(self, name)) is not None}}
        if max_tokens is not None:
            given["max_tokens"] = max_tokens
        if self.logit_bias:
            given["logit_bias"] = {int(token): float(bias) for token, bias in self.logit_bias.items()}
        if self.allowed_token_ids is not None:
            given["allowed_token_ids"] = tuple(self.allowed_token_ids)
        return SamplingParams(**given, stop_token_ids=tuple(self.stop_token_ids or ()), logprobs=logprobs)

    def request_of(self, request_id: str, prompt: str | list[int], params: SamplingParams, **more: Any) -> GenerationRequest:
        """Make the service's request for `prompt` from the fields that all generating routes have. `more` sets further fields."""
        return GenerationRequest(
            request_id=request_id,
            prompt=prompt,
            params=params,
            model=self.model,
            n=self.num_outputs,
            stop=self.stop_strings,
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
            skip_special_tokens=self.skip_special_tokens is not False,
            spaces_between_special_tokens=self.spaces_between_special_tokens is not False,
            bad_words=tuple(self.bad_words or ()),
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            return_token_ids=bool(self.return_token_ids),
            priority=self.priority,
            slo_class=self.named_class,
            **more,
        )
