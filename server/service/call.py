"""Call: the requests that run in the engine for one call of `GenerateService.generate`, from submission to their last event.

Output i of n is a request of its own. The first has the call's `request_id`, the others `request_id-1`, `request_id-2`, ...,
and they name the first in `fork_of`, so that the engine shares the prompt's blocks. Output 0 samples with the client's seed, or a
random one if the client gave none, and output i with a hash of that seed and i (`engine.request.output_seed`). The prompt's
log-probabilities come with the first output only. The cached tokens of the call are the first output's too: the others find the
prompt in the cache because the first has computed it.

Events that the client has not read stay in the engine client's streams: the queue that joins the outputs holds at most one
event of each. A call whose streams hold more than UNREAD_LIMIT for a while ends with RequestTimeout.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec

from engine.errors import InternalError, RequestTimeout, TidegateError
from engine.messages import Submit, check_submit, pack_tokens
from engine.request import SEED_MAX, CachedTokens, TokenEvent, output_seed
from engine.slo import DEFAULT_SLO
from server.engines.base import EngineClientProtocol, TokenStream
from server.metrics.registry import RequestMeter
from server.service.output_builder import OutputBuilder
from server.service.types import Chunk, Ending, GenerationRequest, Identity, Timing, Usage
from server.text.stop import StopStrings
from server.text.tokenizer import Tokenizer

UNREAD_LIMIT = 1 << 17  # in units of `engines.base.size_of`: about 13 MB
UNREAD_SECONDS = 0.25  # between two checks. One check is not enough: after a pause of the event loop every call has unread events
T = TypeVar("T")


class Call:
    """Runs the outputs of one call of `generate`. `unfinished` is the number of outputs that have not ended.

    `ended_by` is the error that ended the call from outside: an abort, a deadline, or a client that does not read.
    """

    def __init__(self, request: GenerationRequest, identity: Identity, meter: RequestMeter) -> None:
        self.request = request
        self.identity = identity
        self.meter = meter
        self.ended_by: TidegateError | None = None
        self.unfinished = request.n
        self._began = time.monotonic()
        self._num_prompt = 0
        self._cached = CachedTokens()
        self._queue_s = 0.0
        self._ttft: float | None = None
        self._preparation: asyncio.Task[Any] | None = None  # work before the submission, such as tokenising
        self._streams: dict[str, TokenStream] = {}  # the outputs' streams by request id, in order of the outputs
        self._only: TokenStream | None = None  # the stream of a call with one output, which needs no queue
        self._outputs: dict[str, OutputBuilder] = {}
        self._pumps: list[asyncio.Task[None]] = []
        self._queue: asyncio.Queue[tuple[str, TokenEvent | BaseException]] = asyncio.Queue(request.n)
        self._fell_behind = False
        self._watch: asyncio.TimerHandle | None = None
        self._deadline: asyncio.TimerHandle | None = None
        if request.deadline_s is not None:
            self._deadline = asyncio.get_running_loop().call_later(request.deadline_s, self._pass_deadline)

    async def prepare(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`. If the call is ended meanwhile, cancel `work` and raise `ended_by`."""
        task = asyncio.create_task(work)
        self._preparation = task
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is None or not current.cancelling():  # `end` has cancelled `work`; this task was not cancelled
                self._raise_if_ended()
            raise
        finally:
            self._preparation = None

    def submit(self, client: EngineClientProtocol, text: Tokenizer, prompt: list[int]) -> None:
        """Send a request for each output to the engine. Raises the exceptions of `check_submit` and of the engine client."""
        self._raise_if_ended()
        self._num_prompt = len(prompt)
        submits = self._submits(prompt)
        check_submit(submits[0], client.info.limits)
        stops = StopStrings(self.request.stop) if self.request.stop else None
        for index, submit in enumerate(submits):
            self._outputs[submit.request_id] = OutputBuilder(index, self.request, text, prompt, stops)
            self._streams[submit.request_id] = client.submit(submit)
        if len(submits) == 1:
            (self._only,) = self._streams.values()
        else:
            self._pumps = [asyncio.create_task(self._pump(*item)) for item in self._streams.items()]
        self._watch_again()

    async def next_event(self) -> TokenEvent | None:
        """Wait for the next event of any output. Returns None for an event of an output that has ended at a stop string."""
        self._raise_if_ended()
        if self._only is not None:
            try:
                return await self._only.__anext__()
            except StopAsyncIteration:
                raise _ended_early(self.request.request_id) from None
        id, item = await self._queue.get()
        if self._outputs[id].finish_reason is not None:
            return None
        if isinstance(item, BaseException):
            raise item
        return item

    def chunk_of(self, event: TokenEvent) -> Chunk:
        """Turn an event from `next_event` into a chunk. If the output ends at a stop string, abort it in the engine."""
        now = time.monotonic()
        chunk = self._outputs[event.request_id].add(event)
        if self._ttft is None:
            self._meter_first(event, now)
        if event.cached is not None and chunk.index == 0:
            self._meter_prompt(event.cached)
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
                cached=self._cached,
                completion_tokens=self._num_completion,
            ),
            timing=Timing(
                queue_ms=self._queue_s * 1e3,
                ttft_ms=(self._ttft or 0.0) * 1e3,
                total_ms=(time.monotonic() - self._began) * 1e3,
            ),
        )

    @property
    def _num_completion(self) -> int:
        return sum(output.num_tokens for output in self._outputs.values())

    @property
    def finish_reason(self) -> str:
        """Why the call ended, for metrics: "length" if any output ended by length, else "stop"."""
        return "length" if any(o.finish_reason == "length" for o in self._outputs.values()) else "stop"

    def end(self, error: TidegateError) -> None:
        """End the call with `error`: cancel the work before the submission, or abort the outputs that have not ended."""
        if self.ended_by is None:
            self.ended_by = error
            if self._preparation is not None:
                self._preparation.cancel()
            self._abort_streams()

    def close(self) -> None:
        """Stop all timers and tasks, and abort the outputs that have not ended."""
        if self.request.progress is not None:
            self.request.progress.prompt_tokens = self._num_prompt
            self.request.progress.completion_tokens = self._num_completion
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
        is_behind = unread > UNREAD_LIMIT // self.request.num_prompts
        if is_behind and self._fell_behind:
            self.end(RequestTimeout("the client does not read its stream: too much of it waits to be sent"))
            return
        self._fell_behind = is_behind
        self._watch_again()

    def _raise_if_ended(self) -> None:
        if self.ended_by is not None:
            raise self.ended_by

    def _submits(self, prompt: list[int]) -> list[Submit]:
        request, identity = self.request, self.identity
        deadline_s = self._deadline_left()
        slo = request.slo_class or identity.slo
        given = request.params.seed
        others = msgspec.structs.replace(request.params, prompt_logprobs=None)
        seed = secrets.randbelow(SEED_MAX) if given is None else given
        first = request.request_id
        packed = pack_tokens(prompt)
        return [
            Submit(
                request_id=first if i == 0 else f"{first}-{i}",
                prompt=packed,
                params=request.params if i == 0 else others,
                seed=output_seed(seed, i),
                priority=max(0, identity.priority_ceiling) if request.priority is None else request.priority,
                fork_of=None if i == 0 else first,
                salt=identity.salt,
                tenant=identity.tenant,
                slo=slo or DEFAULT_SLO,
                promised=slo is not None,
                deadline_s=deadline_s,
            )
            for i in range(request.n)
        ]

    def _deadline_left(self) -> float | None:
        """Return the seconds until the call's deadline, or None if it has none. Raises RequestTimeout if it has passed."""
        if self.request.deadline_s is None:
            return None
        left = self.request.deadline_s - (time.monotonic() - self._began)
        if left <= 0:  # the timer is due, and the event loop has not run it yet
            self._pass_deadline()
            self._raise_if_ended()
        return left

    def _meter_first(self, event: TokenEvent, now: float) -> None:
        self._ttft = now - self._began
        self._queue_s = event.queue_s or 0.0
        progress = self.request.progress
        if progress is not None:
            progress.prompt_tokens = self._num_prompt
            progress.queue_s, progress.ttft_s = self._queue_s, self._ttft
        self.meter.first_token(now, queue_seconds=self._queue_s)

    def _meter_prompt(self, cached: CachedTokens) -> None:
        self._cached = cached
        if self.request.progress is not None:
            self.request.progress.cached = cached
        self.meter.prompt(self._num_prompt, cached.total)

    async def _pump(self, id: str, stream: TokenStream) -> None:
        """Move the events of one output's stream into the queue that joins the outputs, until the stream ends."""
        try:
            async for event in stream:
                await self._queue.put((id, event))
            await self._queue.put((id, _ended_early(id)))  # `next_event` raises it only if no event has ended the output
        except Exception as error:  # noqa: BLE001 - raised again in the task that reads the queue
            await self._queue.put((id, error))


def _ended_early(id: str) -> InternalError:
    return InternalError(f"the events of request {id} stopped without a last one")
