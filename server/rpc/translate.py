"""Translates between protobuf messages and the types of the service. The schemas of the HTTP bodies validate the fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import msgspec
from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from google.protobuf.message import Message
from pydantic import BaseModel, ValidationError

from engine.models.generation import GenerationDefaults
from engine.request import TokenLogprobs
from server.errors import from_validation
from server.http.schemas.generate import GenerateBody
from server.rpc.pb.tidegate.v1 import inference_pb2 as pb
from server.service.pacing import Pacer, Positions, slices
from server.service.types import Chunk, Ending, GenerationRequest

M = TypeVar("M", bound=BaseModel)
TokenText = Callable[[int], str]


def checked(message: Message, schema: type[M]) -> M:
    """Validate the fields that are set in `message` with the HTTP schema `schema`. Raises the same InvalidRequest as for HTTP."""
    try:
        return schema.model_validate({field.name: _plain(field.name, value) for field, value in message.ListFields()})
    except ValidationError as error:
        raise from_validation(error) from None


def _plain(name: str, value: Any) -> Any:
    if name == "logit_bias":
        return {str(token): bias for token, bias in value.items()}  # the schema expects JSON's keys, which are strings
    return value if isinstance(value, str | bool | int | float) else list(value)


def generation_request(
    asked: GenerateBody, request_id: str, defaults: GenerationDefaults, time_remaining: float | None
) -> GenerationRequest:
    """Make the service's request for a gRPC call. `time_remaining` is the time until the call's own deadline in seconds, or None.
    A deadline that has passed counts as one millisecond, so that it still ends the call."""
    deadline_s = None if time_remaining is None else max(time_remaining, 0.001)
    return asked.generation_request(request_id, defaults, deadline_s=deadline_s)


async def write_chunk(message: pb.Chunk, chunk: Chunk, text_of: TokenText, pacer: Pacer) -> None:
    """Write `chunk` into the empty `message`. The message is filled in place, because copying a large one takes milliseconds."""
    message.MergeFrom(pb.Chunk(index=chunk.index, text=chunk.text, token_ids=chunk.token_ids, finish_reason=chunk.finish_reason))
    if chunk.prompt_token_ids is not None:
        message.prompt_token_ids.extend(chunk.prompt_token_ids)
    for field, positions in ((message.logprobs, chunk.logprobs), (message.prompt_logprobs, chunk.prompt_logprobs)):
        if positions is not None:
            await pacer.run(_add_logprobs(field, positions, text_of))
    if isinstance(chunk.stop_reason, str):
        message.stop_text = chunk.stop_reason
    elif chunk.stop_reason is not None:
        message.stop_token_id = chunk.stop_reason


def _add_logprobs(
    field: RepeatedCompositeFieldContainer[pb.TokenInfo], positions: Positions, text_of: TokenText
) -> Iterator[None]:
    """Append the log-probabilities of `positions` to a repeated field of a message. Yields between two slices of work."""
    for i, part in enumerate(slices(positions)):
        if i:
            yield
        field.extend(_token_info(at, text_of) for at in part if at is not None)


def _token_info(at: TokenLogprobs, text_of: TokenText) -> pb.TokenInfo:
    return pb.TokenInfo(
        token_id=at.token,
        text=text_of(at.token),
        logprob=at.logprob,
        rank=at.rank,
        top=[
            pb.TopToken(token_id=token, text=text_of(token), logprob=logprob)
            for token, logprob in zip(at.top_ids, at.top_logprobs, strict=True)
        ],
    )


def ending_message(ending: Ending, model: str) -> pb.Ending:
    usage, timing = ending.usage, ending.timing
    return pb.Ending(
        model=model,
        usage=pb.Usage(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            cached_tokens_by_tier=pb.CachedTokensByTier(**msgspec.structs.asdict(usage.cached)),
            completion_tokens=usage.completion_tokens,
        ),
        timing=pb.Timing(queue_ms=timing.queue_ms, ttft_ms=timing.ttft_ms, total_ms=timing.total_ms),
        cache="off",  # the server has no response cache yet
    )


def sampling_defaults(params: Mapping[str, Any]) -> pb.SamplingDefaults:
    return pb.SamplingDefaults(**params)
