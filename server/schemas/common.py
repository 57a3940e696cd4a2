"""What the request schemas share: strict parsing, and the sampling fields with their ranges from `engine.request.BOUNDS`.

Strict means that "3" is no number, 1 is no boolean and an unknown field is an error. A field that may be left out may also
be null, with the same meaning, as OpenAI clients send it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag, model_validator

from engine.errors import UnsupportedField
from engine.request import BOUNDS, MAX_LOGIT_BIAS, MAX_STOP_IDS, SamplingParams

# The widest that `Settings` can allow; what it does allow is the service's to check, for HTTP and gRPC alike.
MAX_N = 128  # outputs of one prompt
MAX_STOP = 1024  # stop strings
MAX_STOP_CHARS = 65536
MAX_PROMPTS = 128  # of one completions call
MAX_PROMPT_TOKENS = 1 << 21  # a list longer than any context; the body's limit comes first
TOKEN_ID_MAX = 2**31 - 1


def bounded(name: str, description: str, **more: Any) -> Any:
    """A Field in the closed range that `BOUNDS` gives to `name`."""
    low, high = BOUNDS[name]
    return Field(ge=low, le=high, description=description, **more)


TokenId = Annotated[int, Field(ge=0, le=TOKEN_ID_MAX)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_TOKENS)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]


def _stop_kind(value: Any) -> str | None:
    return "#text" if isinstance(value, str) else "#texts" if isinstance(value, list) else None


Stop = Annotated[
    Annotated[StopText, Tag("#text")] | Annotated[list[StopText], Field(max_length=MAX_STOP), Tag("#texts")],
    Discriminator(_stop_kind, custom_error_type="stop_kind", custom_error_message="must be a string or a list of strings"),
]
TokenKey = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")]
Bias = Annotated[float, bounded("logit_bias", "Added to the token's logit.")]


def without_unsupported(value: dict[Any, Any], table: dict[str, tuple[Any, ...]], *, path: str = "") -> dict[Any, Any]:
    """`value` less the fields in `table`, which may be there only as null or as a value that asks for nothing."""
    found = value.keys() & table.keys()
    if not found:
        return value
    for name in sorted(found):
        given = value[name]
        if given is not None and not any(type(given) is type(v) and given == v for v in table[name]):
            raise UnsupportedField(f"this server does not support {path}{name}", param=f"{path}{name}")
    return {name: given for name, given in value.items() if name not in found}


class Schema(BaseModel):
    """A request, or a part of one."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=())

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {}  # field we know and cannot do -> values that ask for nothing

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, value: Any) -> Any:
        return without_unsupported(value, cls.UNSUPPORTED) if isinstance(value, dict) else value


class SamplingFields(Schema):
    """How to choose tokens and when to stop: the fields common to all generating routes."""

    temperature: Annotated[float | None, bounded("temperature", "0 takes the likeliest token each time.")] = None
    top_p: Annotated[float | None, bounded("top_p", "Sample from the likeliest tokens that make up this probability.")] = None
    top_k: Annotated[int | None, bounded("top_k", "Sample from this many likeliest tokens; 0 for all.")] = None
    min_p: Annotated[float | None, bounded("min_p", "Drop tokens below this share of the likeliest one's probability.")] = None
    seed: Annotated[int | None, bounded("seed", "The same seed and request give the same tokens.")] = None
    n: Annotated[int | None, Field(ge=1, le=MAX_N, description="Number of outputs of each prompt.")] = None
    stop: Annotated[Stop | None, Field(description="Text that ends an output and is left out of it.", examples=[["\n\n"]])] = None
    stop_token_ids: Annotated[list[TokenId] | None, Field(max_length=MAX_STOP_IDS, description="Tokens that end an output.")] = (
        None
    )
    min_tokens: Annotated[int | None, bounded("min_tokens", "No end before this many tokens.")] = None
    ignore_eos: Annotated[bool | None, Field(description="Go on past the model's end-of-sequence tokens.")] = None
    presence_penalty: Annotated[float | None, bounded("presence_penalty", "Against tokens already generated.")] = None
    frequency_penalty: Annotated[float | None, bounded("frequency_penalty", "The same, times how often.")] = None
    repetition_penalty: Annotated[float | None, bounded("repetition_penalty", "Over prompt and output; 1 for none.")] = None
    logit_bias: Annotated[
        dict[TokenKey, Bias] | None, Field(max_length=MAX_LOGIT_BIAS, description="Token id -> what to add to its logit.")
    ] = None
    prompt_logprobs: Annotated[int | None, bounded("prompt_logprobs", "Alternatives to report at each prompt token.")] = None
    stream: Annotated[bool | None, Field(description="Answer with server-sent events.")] = None
    priority: Annotated[int | None, bounded("priority", "A smaller number runs first.")] = None

    @property
    def num_outputs(self) -> int:
        return self.n or 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Raises InvalidRequest for fields that contradict each other."""
        given = {name: value for name in _PLAIN if (value := getattr(self, name)) is not None}
        if max_tokens is not None:
            given["max_tokens"] = max_tokens
        if self.logit_bias:
            given["logit_bias"] = {int(token): float(bias) for token, bias in self.logit_bias.items()}
        return SamplingParams(**given, stop_token_ids=tuple(self.stop_token_ids or ()), logprobs=logprobs)


_PLAIN = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "min_tokens",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "prompt_logprobs",
)
