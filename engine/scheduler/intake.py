"""Intake: refuses requests that the cache cannot hold, that the queue has no room for, or that would start too late."""

from __future__ import annotations

from collections.abc import Callable

from engine.config import EngineConfig
from engine.errors import ContextTooLong, Overloaded
from engine.kvcache.manager import KVCacheManager
from engine.request import Request
from engine.scheduler.forecast import Forecast
from engine.scheduler.limits import StepLimits
from engine.scheduler.queue import WaitingQueue
from engine.scheduler.shares import Held, QueueShares


class Intake:
    """Checks requests that arrive. `leader` finds the sibling whose prompt a request forks. `limits` are those of a step now."""

    def __init__(
        self,
        cache: KVCacheManager,
        queue: WaitingQueue,
        config: EngineConfig,
        forecast: Forecast,
        leader: Callable[[Request], Request | None],
    ) -> None:
        self._cache = cache
        self._queue = queue
        self._host_tier_bytes = config.cache.host_tier_bytes or 0
        self._shares = QueueShares(config.scheduler.max_queue, config.scheduler.max_queue_tokens)
        self._forecast = forecast
        self._leader = leader

    def check_size(self, request: Request, limits: StepLimits) -> None:
        """Raise ContextTooLong or Overloaded if the cache can never hold the request, or if the queue cannot hold it now."""
        # The last token is never fed back to the model, so it needs no slot in the cache.
        needed = self._cache.blocks_for(request.end_len - 1)
        if needed > self._cache.max_blocks:
            raise ContextTooLong(self._too_long(request, needed), param="max_tokens")
        request.spills = self._cache.outgrows(request)
        waiting = Held(len(self._queue), self._queue.num_tokens)
        self._shares.note(request.tenant)
        why = self._shares.refusal(len(request.tokens), waiting, self._queue.held_by(request.tenant))
        if why is not None:
            seconds = self._forecast.waiting_seconds(limits)
            raise Overloaded(f"{why}: try again later", retry_after=seconds / waiting.requests)

    def check_latency(self, request: Request, limits: StepLimits) -> None:
        """Raise Overloaded or RequestTimeout if the request's first token would come too late."""
        if self._leader(request) is not None:
            request.num_matched = len(request.tokens) - 1
        elif (request.promised or request.deadline is not None) and request.params.prompt_logprobs is None:
            # Only such requests are worth a look at the cache now: the hashes of a long queue would fill the memory.
            matches = self._cache.prefix_caching and not request.spills
            request.num_matched = self._cache.reach(request) * self._cache.block_size if matches else 0
        self._forecast.check(request, limits)

    def _too_long(self, request: Request, needed: int) -> str:
        """Return the message for a request of `needed` blocks, which are more than cache and host tier hold."""
        cache = self._cache
        held, more = "this server's KV cache", ""
        slots = cache.max_blocks - cache.num_blocks
        if slots:
            held += " and its host tier"
            right = (needed - cache.num_blocks) * -(-self._host_tier_bytes // slots)
            more = f" (cache.host_tier_bytes is {self._host_tier_bytes}; with {right} the server could hold them)"
        return (
            f"This model's maximum context length is {cache.max_blocks * cache.block_size} tokens, which {held} can hold. "
            f"However, you requested {request.end_len} tokens: send a shorter prompt or a smaller max_tokens.{more}"
        )
