"""Call: one request's siblings in the engine, from submission to the last event. The service drives it.

Output i of n runs as a request of its own: `id` itself for the first, `id-1`, `id-2`, ... for the others, which name the first in
`fork_of` so that the engine shares its prompt's blocks. Output i samples with seed + i (mod 2^63); where the client gave no
seed, one is drawn. So output i of a seeded call of n equals the one output of a call with seed + i. The prompt's
log-probabilities come with the first output only.

What nobody takes stays in the streams, where it can grow: the queue that brings the siblings together holds one event of each.
A call that has left more than UNREAD_LIMIT there for a while ends with RequestTimeout.
"""

from __future__ import annotations

import asyncio
import secrets
import time

import msgspec

from engine.errors import InternalError, RequestTimeout, TidegateError
from engine.messages import Submit, check_submit, pack_tokens
from engine.request import SEED_MAX, TokenEvent
from server.engines.base import EngineClientProtocol, TokenStream
from server.metrics.registry import RequestMeter
from server.service.output import Output
from server.service.types import Chunk, Ending, GenerationRequest, Timing, Usage
from server.text.stop import StopScanner, StopStrings
from server.text.tokenizer import Tokenizer

UNREAD_LIMIT = 1 << 17  # in `size_of`'s units: some 13 MB
UNREAD_SECONDS = 0.25  # between looks; the second one in a row decides, since any call falls behind while the loop itself does


class Call:
    def __init__(self, request: GenerationRequest, meter: RequestMeter) -> None:
        self.request = request
        self.meter = meter
        self.ended_by: TidegateError | None = None  # why we ended it ourselves
        self.unfinished = request.n  # outputs
        self._began = time.monotonic()
        self._num_prompt = 0
        self._num_cached = 0
        self._queue_s = 0.0
        self._ttft: float | None = None
        self._streams: dict[str, TokenStream] = {}  # by sibling's request id, in order
        self._only: TokenStream | None = None  # the one stream, which then needs no queue
        self._outputs: dict[str, Output] = {}
        self._pumps: list[asyncio.Task[None]] = []
        self._queue: asyncio.Queue[tuple[str, TokenEvent | BaseException]] = asyncio.Queue(request.n)
        self._fell_behind = False
        self._watch: asyncio.TimerHandle | None = None
        self._deadline: asyncio.TimerHandle | None = None
        if request.deadline_s is not None:
            self._deadline = asyncio.get_running_loop().call_later(request.deadline_s, self._pass_deadline)

    def submit(self, client: EngineClientProtocol, text: Tokenizer, prompt: list[int]) -> None:
        self._raise_if_ended()
        self._num_prompt = len(prompt)
        submits = self._submits(prompt)
        check_submit(submits[0], client.info.limits)
        params = self.request.params
        stops = StopStrings(self.request.stop) if self.request.stop else None
        for index, submit in enumerate(submits):
            self._outputs[submit.request_id] = Output(
                index,
                text.detokenizer(prompt),
                None if stops is None else StopScanner(stops),
                min_tokens=params.min_tokens,
                named_stop_ids=params.stop_token_ids,
            )
            self._streams[submit.request_id] = client.submit(submit)
        if len(submits) == 1:
            (self._only,) = self._streams.values()
        else:
            self._pumps = [asyncio.create_task(self._pump(*item)) for item in self._streams.items()]
        self._watch_again()

    async def next_event(self) -> TokenEvent | None:
        """The next event of any sibling; None for one that says nothing."""
        self._raise_if_ended()
        if self._only is not None:
            try:
                return await self._only.__anext__()
            except StopAsyncIteration:
                raise _ended_early(self.request.request_id) from None
        id, item = await self._queue.get()
        if self._outputs[id].finish_reason is not None:
            return None  # what comes of an output after its stop string
        if isinstance(item, BaseException):
            raise item
        return item

    def take(self, event: TokenEvent) -> Chunk:
        now = time.monotonic()
        output = self._outputs[event.request_id]
        chunk = output.take(event)
        if self._ttft is None:
            self._take_first(event, now)
        if chunk.token_ids:
            self.meter.tokens(chunk.index, len(chunk.token_ids), now)
        if chunk.finish_reason is not None:
            self.unfinished -= 1
            if event.finish is None:
                self._streams[event.request_id].abort()
        return chunk

    def ending(self) -> Ending:
        return Ending(
            usage=Usage(
                prompt_tokens=self._num_prompt,
                cached_tokens=self._num_cached,
                completion_tokens=sum(output.num_tokens for output in self._outputs.values()),
            ),
            timing=Timing(
                queue_ms=self._queue_s * 1e3,
                ttft_ms=(self._ttft or 0.0) * 1e3,
                total_ms=(time.monotonic() - self._began) * 1e3,
            ),
        )

    @property
    def finish_reason(self) -> str:
        """ "length" where any output ended so."""
        return "length" if any(o.finish_reason == "length" for o in self._outputs.values()) else "stop"

    def end(self, error: TidegateError) -> None:
        """Have the call end with `error`, from outside of it."""
        if self.ended_by is None:
            self.ended_by = error
            self._abort_streams()

    def close(self) -> None:
        """Leave nothing behind in the engine or the loop."""
        for timer in (self._deadline, self._watch):
            if timer is not None:
                timer.cancel()
        for pump in self._pumps:
            pump.cancel()
        if self.unfinished:
            self._abort_streams()

    def _abort_streams(self) -> None:
        for id, stream in self._streams.items():
            if self._outputs[id].finish_reason is None:
                stream.abort()

    def _pass_deadline(self) -> None:
        self.end(RequestTimeout(f"the request passed its deadline of {self.request.deadline_s:g} s", param="deadline_ms"))

    def _watch_again(self) -> None:
        self._watch = asyncio.get_running_loop().call_later(UNREAD_SECONDS, self._check_unread)

    def _check_unread(self) -> None:
        unread = sum(stream.unread for stream in self._streams.values())
        behind = unread > UNREAD_LIMIT // self.request.num_prompts
        if behind and self._fell_behind:
            self.end(RequestTimeout("the client does not read its stream: too much of it waits to be sent"))
            return
        self._fell_behind = behind
        self._watch_again()

    def _raise_if_ended(self) -> None:
        if self.ended_by is not None:
            raise self.ended_by

    def _submits(self, prompt: list[int]) -> list[Submit]:
        request = self.request
        given = request.params.seed
        others = msgspec.structs.replace(request.params, prompt_logprobs=None)  # they have the first one's prompt
        seed = secrets.randbelow(SEED_MAX + 1) if given is None else given
        first = request.request_id
        packed = pack_tokens(prompt)
        return [
            Submit(
                request_id=first if i == 0 else f"{first}-{i}",
                prompt=packed,
                params=request.params if i == 0 else others,
                seed=(seed + i) % (SEED_MAX + 1),
                priority=request.priority,
                fork_of=None if i == 0 else first,
            )
            for i in range(request.n)
        ]

    def _take_first(self, event: TokenEvent, now: float) -> None:
        self._ttft = now - self._began
        self._num_cached = event.num_cached or 0
        self._queue_s = event.queue_s or 0.0
        self.meter.first_token(now, prompt_tokens=self._num_prompt, cached_tokens=self._num_cached, queue_seconds=self._queue_s)

    async def _pump(self, id: str, stream: TokenStream) -> None:
        try:
            async for event in stream:
                await self._queue.put((id, event))
            await self._queue.put((id, _ended_early(id)))  # read only where the last event did not end the output
        except Exception as error:  # noqa: BLE001 - raised again in the task that reads the queue
            await self._queue.put((id, error))


def _ended_early(id: str) -> InternalError:
    return InternalError(f"the events of request {id} stopped without a last one")
