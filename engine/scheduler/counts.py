"""SchedulerCounts: what has happened to requests and tokens since the start."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import InternalError
from engine.request import CachedTokens


@dataclass(slots=True)
class SchedulerCounts:
    """Counts requests and tokens. Every accepted request is finished, aborted, failed, running or waiting, at every moment."""

    num_accepted: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_failed: int = 0  # requests that ended because their logits were not finite, or because they exclude every token
    num_preemptions: int = 0
    prompt_tokens: int = 0  # of admitted requests, each request counted once
    cached_tokens: int = 0  # the part of prompt_tokens that was found in the prefix cache
    host_cached_tokens: int = 0  # the part of cached_tokens that was loaded from host memory for the request
    disk_cached_tokens: int = 0  # and from disk
    output_tokens: int = 0

    def admitted(self, num_prompt: int, cached: CachedTokens) -> None:
        """Count the prompt of a request that is admitted for the first time."""
        self.prompt_tokens += num_prompt
        self.cached_tokens += cached.total
        self.host_cached_tokens += cached.host
        self.disk_cached_tokens += cached.disk

    def check(self, num_unfinished: int) -> None:
        """Raise InternalError unless accepted requests = finished + aborted + failed + `num_unfinished` (running and waiting)."""
        if self.num_accepted != self.num_finished + self.num_aborted + self.num_failed + num_unfinished:
            raise InternalError("the numbers of accepted and ended requests do not add up")
        if not self.host_cached_tokens + self.disk_cached_tokens <= self.cached_tokens <= self.prompt_tokens:
            raise InternalError("more prompt tokens are counted in a part than in the whole")
