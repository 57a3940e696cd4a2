"""Implements the gRPC service tidegate.v1.Inference. Each method translates its message, calls the GenerateService, and
translates the answer."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import aclosing

import msgspec

from engine.errors import RequestTimeout
from server.http.schemas.generate import GenerateBody
from server.http.schemas.service import DetokenizeBody, TokenizeTextBody
from server.rpc import translate
from server.rpc.current_call import CURRENT_CALL, metadata_of
from server.rpc.errors import Context, answers_errors
from server.rpc.pb.tidegate.v1 import inference_pb2 as pb
from server.rpc.pb.tidegate.v1 import inference_pb2_grpc as pb_grpc
from server.service.pacing import Pacer
from server.service.service import GenerateService
from server.service.types import Chunk
from server.settings import Settings


class InferenceServicer(pb_grpc.InferenceServicer):
    """Answers the calls of tidegate.v1.Inference. It ends a stream whose client reads nothing for `send_timeout_s` seconds."""

    def __init__(self, service: GenerateService, settings: Settings) -> None:
        self._service = service
        self._send_timeout_s = settings.send_timeout_s
        self.strict_fields = settings.strict_fields
        self._pacer = Pacer()

    @answers_errors(pb.GenerateRequest)
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        """Stream the chunks of one generation. This method writes each response itself and does not yield it, because a generator
        would stay suspended at its `yield` when the client cancels."""
        asked = translate.checked(request, GenerateBody)
        id = f"gen-{uuid.uuid4().hex}"
        call = CURRENT_CALL.get()
        call.answered_by(id)
        generation = translate.generation_request(asked, id, self._service.defaults, context.time_remaining())
        generation = msgspec.structs.replace(generation, progress=call.new_progress())
        await context.send_initial_metadata(metadata_of(call))
        model = self._service.model_name
        async with aclosing(self._service.generate(generation, self._service.anonymous, transport="grpc")) as stream:
            async for item in stream:
                response = pb.GenerateResponse(id=id, request_id=asked.request_id)
                if isinstance(item, Chunk):
                    response.chunk.SetInParent()
                    await translate.write_chunk(response.chunk, item, self._service.token_text, self._pacer)
                else:
                    response.ending.CopyFrom(translate.ending_message(item, model))
                await self._send(context, response)

    async def _send(self, context: Context, response: pb.GenerateResponse) -> None:
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await context.write(response)
        except TimeoutError:
            raise RequestTimeout(f"the client read nothing for {self._send_timeout_s:g} seconds") from None

    @answers_errors(pb.TokenizeRequest)
    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        asked = translate.checked(request, TokenizeTextBody)
        tokens = await self._service.tokenize(
            asked.prompt, model=asked.model, add_special_tokens=asked.add_special_tokens is not False
        )
        return pb.TokenizeResponse(tokens=tokens, count=len(tokens), max_model_len=self._service.max_model_len)

    @answers_errors(pb.DetokenizeRequest)
    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        asked = translate.checked(request, DetokenizeBody)
        skip = bool(asked.skip_special_tokens)
        text = await self._service.detokenize(asked.tokens, model=asked.model, skip_special_tokens=skip)
        return pb.DetokenizeResponse(prompt=text)

    @answers_errors(pb.ListModelsRequest)
    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        models = [
            pb.Model(
                id=model.id,
                created=model.created,
                owned_by=model.owned_by,
                max_model_len=model.max_model_len,
                default_sampling_params=translate.sampling_defaults(model.default_sampling_params),
            )
            for model in self._service.models()
        ]
        return pb.ListModelsResponse(models=models)

    @answers_errors(pb.AbortRequest)
    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        return pb.AbortResponse(aborted=self._service.abort(request.id))
