"""Sends requests over Tidegate's gRPC service."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import grpc
import msgspec
from google.protobuf.message import DecodeError

from loadtest.clients.base import Call
from loadtest.record import Failure, Reading
from loadtest.spec import Load, LoadError, Target
from server.rpc.pb.tidegate.v1 import inference_pb2 as pb
from server.rpc.pb.tidegate.v1 import inference_pb2_grpc as pb_grpc

_CHANNELS = 8  # connections: one alone would carry all streams through one flow-control window
_TIMEOUT = 10.0
_DETAIL = "tidegate-error-bin"  # trailing metadata that says that the server itself ended the call
_REFUSED = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)


class GrpcClient:
    def __init__(self, target: Target, load: Load) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        address = _address(target)
        self._channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(_CHANNELS)]
        self._stubs = itertools.cycle([_stub(channel) for channel in self._channels])
        self._metadata = _metadata(target)
        self._target, self._load = target, load

    async def stream(self, call: Call, reading: Reading) -> None:
        stream = next(self._stubs).Generate(self._request(call), metadata=self._metadata)
        ended = False
        try:
            async for response in stream:
                now = time.perf_counter()
                if response.HasField("ending"):
                    usage = response.ending.usage
                    reading.usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
                    ended = True
                elif num := len(response.chunk.token_ids):
                    reading.event(now, num)
                    if reading.keep:
                        reading.answer_ids += response.chunk.token_ids
                if call.slow:
                    await asyncio.sleep(response.ByteSize() / self._load.slow_bytes)
        except grpc.aio.AioRpcError as error:
            raise _failure(error) from None
        finally:
            stream.cancel()  # has no effect on a call that has ended
        if not ended:
            raise Failure("closed early", "the stream ended without an Ending")

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close(grace=None)

    def _request(self, call: Call) -> Any:
        load = self._load
        request = pb.GenerateRequest(model=self._target.model or None, max_tokens=call.max_tokens, temperature=load.temperature)
        if call.prompt.ids is None:
            request.prompt = call.prompt.text or ""
        else:
            request.prompt_token_ids.extend(call.prompt.ids.tolist())
        if load.ignore_eos:
            request.ignore_eos = True
        if load.deadline_ms is not None:
            request.deadline_ms = load.deadline_ms
        if call.slo_class is not None:
            request.slo_class = call.slo_class
        return request


def describe_grpc(target: Target) -> Target:
    """Return the target with what ListModels says: the model's name and its context. Raises LoadError."""
    with grpc.insecure_channel(_address(target)) as channel:
        try:
            listed = _stub(channel).ListModels(pb.ListModelsRequest(), timeout=_TIMEOUT, metadata=_metadata(target))
        except grpc.RpcError as error:
            raise LoadError(
                f"gRPC at {target.url}: ListModels failed with {error.code().name}: {error.details()}; is a Tidegate server "
                "running, and is this its gRPC port?"
            ) from None
    models = {model.id: model for model in listed.models}
    name = target.model or next(iter(models))
    if name not in models:
        raise LoadError(f"{target.url} has no model {name!r}: it has {', '.join(models)}")
    return msgspec.structs.replace(target, model=name, context=models[name].max_model_len, is_tidegate=True)


def grpc_has_id(target: Target, token: int) -> bool:
    """Say whether the model has the token id: Detokenize refuses one that it does not have."""
    with grpc.insecure_channel(_address(target)) as channel:
        try:
            _stub(channel).Detokenize(pb.DetokenizeRequest(tokens=[token]), timeout=_TIMEOUT, metadata=_metadata(target))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                return False
            raise LoadError(f"gRPC at {target.url}: Detokenize failed with {error.code().name}; name --vocab") from None
    return True


def _metadata(target: Target) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {target.api_key}"),) if target.api_key else ()


def _stub(channel: grpc.aio.Channel | grpc.Channel) -> Any:
    return pb_grpc.InferenceStub(channel)  # type: ignore[no-untyped-call]  # generated code


def _address(target: Target) -> str:
    scheme, separator, address = target.url.rpartition("://")
    if separator and scheme != "grpc":
        raise LoadError(f"{target.url!r} is no gRPC address: write HOST:PORT")
    return address


def _failure(error: grpc.aio.AioRpcError) -> Failure:
    """Return the failure of a call. An UNAVAILABLE without the server's own detail means that there was no connection."""
    trailing: dict[str, Any] = dict(error.trailing_metadata() or ())  # type: ignore[arg-type]  # pairs of key and value
    detail = pb.ErrorDetail()
    own = _DETAIL in trailing
    if own:
        try:
            detail.ParseFromString(trailing[_DETAIL])
        except DecodeError:
            own = False
    if error.code() is grpc.StatusCode.UNAVAILABLE and not own:
        return Failure("no connection", error.details() or "")
    return Failure(
        f"{error.code().name} {detail.code}".strip(),
        error.details() or "",
        refused=error.code() in _REFUSED,
        retry_after=float(detail.retry_after) if own and detail.HasField("retry_after") else None,
    )
