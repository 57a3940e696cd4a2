"""Link: how fast blocks come over a link from a lower tier, learnt from those that have come, and how long further ones take."""

from __future__ import annotations

TELLING = 8  # blocks that tell together how long one takes; fewer may only have waited for the next look
TELLING_SECONDS = 0.2  # waiting for so long tells too, however few blocks have come
MEMORY = 0.2  # weight of the latest measurement
HALF_LIFE = 30.0  # seconds without a measurement after which a link is believed to be twice as fast: it must be tried again


class Link:
    """Blocks come one after the other. An unmeasured link is believed to take no time."""

    __slots__ = ("_busy_since", "_measured_at", "_num", "_seconds", "_took", "num_blocks", "num_queued", "seconds_busy")

    def __init__(self) -> None:
        self.num_queued = 0  # blocks that are under way
        self.num_blocks = 0  # blocks that have come since the start
        self.seconds_busy = 0.0  # time since the start in which some block was under way
        self._busy_since = 0.0  # when the block that is under way first began to come, as far as is known
        self._num, self._took = 0, 0.0  # blocks that have come since the latest measurement, and how long it took
        self._seconds = 0.0  # of one block
        self._measured_at: float | None = None

    def begin(self, num: int, now: float) -> None:
        """Note that `num` further blocks are under way."""
        if not self.num_queued:
            self._busy_since = now
        self.num_queued += num

    def cancel(self, num: int) -> None:
        """Note that `num` blocks are not coming any more."""
        self.num_queued -= num

    def end(self, num: int, now: float) -> None:
        """Note that `num` blocks have come, or have failed to."""
        took = max(0.0, now - self._busy_since)
        self._busy_since = now
        self.num_queued -= num
        self.num_blocks += num
        self.seconds_busy += took
        self._num += num
        self._took += took
        if self._num >= TELLING or self._took >= TELLING_SECONDS:
            each = self._took / self._num
            self._seconds = each if self._measured_at is None else self._seconds + MEMORY * (each - self._seconds)
            self._num, self._took, self._measured_at = 0, 0.0, now

    def predict(self, num: int, now: float) -> float:
        """Return the seconds until `num` further blocks would have come, behind those that are under way."""
        if self._measured_at is None:
            return 0.0
        return self._seconds * 0.5 ** ((now - self._measured_at) / HALF_LIFE) * (self.num_queued + num) if num else 0.0
