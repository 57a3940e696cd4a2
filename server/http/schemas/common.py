"""Defines the base of all request schemas: strict parsing, and sampling fields with their ranges from `engine.request.BOUNDS`.

HTTP and gRPC validate requests with the same schemas. Strict means: "3" is not a number, 1 is not a boolean, and an unknown
field is an error. Every optional field may also be null, with the same meaning, because OpenAI clients send it so.

A body within the size limit can hold a million faults, and pydantic would spend seconds collecting all of them. So long lists
stop at the first fault (`fail_fast`), and objects with too many keys are cut or refused before pydantic reads their keys.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from engine.errors import UnsupportedField
from engine.request import BOUNDS, MAX_LOGIT_BIAS, MAX_STOP_IDS, SamplingParams
from server.service.types import GenerationRequest

# Upper bounds of the limits that an operator can set in `Settings`. The service checks a request against the limits that are set.
MAX_N = 128  # most outputs of one prompt
MAX_STOP = 1024  # most stop strings of one request
MAX_STOP_CHARS = 65536  # most characters of one stop string
MAX_PROMPTS = 128  # most prompts of one request of POST /v1/completions
MAX_PROMPT_TOKENS = 1 << 21  # more than any model's context; the limit on the size of the body is usually reached before
TOKEN_ID_MAX = 2**31 - 1


def bounded(name: str, description: str = "", **more: Any) -> Any:
    """Make a pydantic Field for a number in the closed range `BOUNDS[name]`. The default description is the one in `BOUNDS`."""
    low, high, about = BOUNDS[name]
    return Field(ge=low, le=high, description=description or about, **more)


TokenId = Annotated[int, Field(ge=0, le=TOKEN_ID_MAX)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPT_TOKENS)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]


def _stop_kind(value: Any) -> str | None:
    return "#text" if isinstance(value, str) else "#texts" if isinstance(value, list) else None


Stop = Annotated[
    Annotated[StopText, Tag("#text")] | Annotated[list[StopText], Field(fail_fast=True, max_length=MAX_STOP), Tag("#texts")],
    Discriminator(_stop_kind, custom_error_type="stop_kind", custom_error_message="must be a string or a list of strings"),
]
# The pattern allows one spelling of each token id, so that no object has the same token twice.
TokenKey = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, bounded("logit_bias", "Number that is added to the token's logit.")]


def at_most(num_keys: int) -> BeforeValidator:
    """Return a validator that refuses a dict with more than `num_keys` keys before pydantic validates any key. Pydantic's own
    max_length counts the keys only afterwards."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > num_keys:
            raise PydanticCustomError("too_many_keys", "should have at most {most} entries", {"most": num_keys})
        return value

    return BeforeValidator(check)


def without_unsupported(value: dict[Any, Any], table: dict[str, tuple[Any, ...]], *, path: str = "") -> dict[Any, Any]:
    """Return `value` without the fields that `table` names. Raises UnsupportedField if such a field has a value other than null
    or one of the values that the table lists for it, which have no effect."""
    found = value.keys() & table.keys()
    if not found:
        return value
    for name in sorted(found):
        given = value[name]
        if given is not None and not any(type(given) is type(v) and given == v for v in table[name]):
            raise UnsupportedField(f"this server does not support {path}{name}: leave it out", param=f"{path}{name}")
    return {name: given for name, given in value.items() if name not in found}


class Schema(BaseModel):
    """Base class of the schemas of request bodies and their parts."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=())

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {}  # unsupported field -> values that have no effect and are accepted

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: Any) -> Any:
        return cls._with_one_unknown(without_unsupported(value, cls.UNSUPPORTED)) if isinstance(value, dict) else value

    @classmethod
    def _with_one_unknown(cls, value: dict[Any, Any]) -> dict[Any, Any]:
        """Remove all but one of the unknown keys of `value`, if `value` has more keys than the schema has fields. One unknown key
        is enough for pydantic to refuse the object, and reporting one takes less time than reporting all."""
        fields = cls.model_fields
        if len(value) <= len(fields):
            return value
        unknown = next(name for name in value if name not in fields)
        return {name: given for name, given in value.items() if name in fields or name is unknown}


_OWN = ("max_tokens", "logprobs", "logit_bias")  # fields that each route declares itself, or that are not a single number
_KINDS = get_type_hints(SamplingParams)
_NUMBERS = tuple(name for name in SamplingParams.__struct_fields__ if name in BOUNDS and name not in _OWN)
_PLAIN = (*_NUMBERS, "ignore_eos")
_fields: dict[str, Any] = {name: (Annotated[_KINDS[name] | None, bounded(name)], None) for name in _NUMBERS}
_Numbers: Any = create_model("_Numbers", __base__=Schema, **_fields)


class SamplingFields(_Numbers):  # type: ignore[misc]
    """How to sample tokens and when to stop. All generating routes have these fields."""

    n: Annotated[int | None, Field(ge=1, le=MAX_N, description="Number of outputs for each prompt.")] = None
    stop: Annotated[
        Stop | None,
        Field(description="One string or several. An output ends before the first of them that appears.", examples=[["\n\n"]]),
    ] = None
    stop_token_ids: Annotated[
        list[TokenId] | None, Field(max_length=MAX_STOP_IDS, description="Token ids that end an output.")
    ] = None
    ignore_eos: Annotated[bool | None, Field(description="Continue after the model's end-of-sequence tokens.")] = None
    logit_bias: Annotated[
        Annotated[dict[TokenKey, Bias], at_most(MAX_LOGIT_BIAS), Field(max_length=MAX_LOGIT_BIAS)] | None,
        Field(description="Token id -> number that is added to the token's logit."),
    ] = None
    stream: Annotated[bool | None, Field(description="Send the answer as server-sent events while it is generated.")] = None
    priority: Annotated[int | None, bounded("priority", "Requests with a smaller number run first.")] = None

    @property
    def num_outputs(self) -> int:
        return self.n or 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Make SamplingParams from the body's fields. Raises InvalidRequest for fields that contradict each other."""
        given = {name: value for name in _PLAIN if (value := getattr(self, name)) is not None}
        if max_tokens is not None:
            given["max_tokens"] = max_tokens
        if self.logit_bias:
            given["logit_bias"] = {int(token): float(bias) for token, bias in self.logit_bias.items()}
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
            priority=self.priority or 0,
            **more,
        )
