"""Runs an API worker's text work (tokenising, decoding, chat templates) without holding up the event loop or short texts.

A lane is a pool of threads with a queue. The length of a text decides where it runs:

    up to INLINE_CHARS         in the event loop: about 1 ms
    up to one piece            in the short lane, where no work is longer than one piece takes
    longer                     in the long lane, piece by piece, alternating with the other long texts
    pieces longer than HUGE    in the huge lane, one at a time: a piece may take seconds, and some 200 bytes a character
    long chats, to render      in the chat lane, one at a time: rendering cannot be cut, and may take seconds

A job has at most one piece in a lane's queue. So jobs share a lane fairly, a cancelled job frees the lane at once, and the
tokenizer's memory does not grow with the number of jobs. The texts longer than a piece are bounded by their bytes in total.
Above the bound a text is refused with Overloaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from engine.errors import Overloaded
from server.text.bad_words import bad_word_tokens
from server.text.jobs import Job
from server.text.tokenizer import PIECE_CHARS, PIECE_TOKENS, Tokenizer

INLINE_CHARS = 2048  # longest text that is tokenised in the event loop, and longest chat that is rendered there
INLINE_TOKENS = 256  # most token ids that are decoded in the event loop
INLINE_WORDS = 256  # most characters of bad words that are tokenised in the event loop
# A piece of text or of token ids larger than HUGE has a thread of its own, since other long texts would have to wait for it.
HUGE = 16 * PIECE_CHARS  # number of characters or of token ids
_SHORT_THREADS = 2
T = TypeVar("T")


class TooManyTokens(Exception):
    """Raised for a text that has more tokens than the limit that the caller gave."""


class TextWork:
    """Does the text work of one API worker: it tokenises and decodes texts and renders chats.

    `max_waiting_bytes` bounds the bytes of the long texts that run or wait at the same time. A single text may be longer.
    """

    def __init__(self, tokenizer: Tokenizer, max_waiting_bytes: int) -> None:
        self._tokenizer = tokenizer
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting_bytes = 0
        self._short = ThreadPoolExecutor(_SHORT_THREADS, "tidegate-text-short")
        self._long = ThreadPoolExecutor(1, "tidegate-text-long")
        self._huge = ThreadPoolExecutor(1, "tidegate-text-huge")
        self._chat = ThreadPoolExecutor(1, "tidegate-text-chat")

    async def encode(self, text: str, *, add_special_tokens: bool, limit: int | None = None) -> list[int]:
        """Tokenise `text` and return its token ids.

        Raises TooManyTokens as soon as it is certain that there are more than `limit`, and Overloaded if too many long texts
        run or wait.
        """
        tokenizer = self._tokenizer
        if limit is not None and await self._exceeds(text, limit):
            raise TooManyTokens
        if len(text) <= INLINE_CHARS:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        job = tokenizer.encoding(text, add_special_tokens=add_special_tokens)
        num_bytes = len(text.encode()) if len(text) > PIECE_CHARS else 0
        with self._admitted(num_bytes):
            lane = self._long if num_bytes else self._short
            while not job.done:
                await self._step(job, lane)
                if limit is not None and job.num_tokens > limit:
                    raise TooManyTokens
            return await self._in_lane(lane, job.result)

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Decode the token ids `ids` to text. Raises Overloaded if too many long texts run or wait."""
        if len(ids) <= INLINE_TOKENS:
            return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return await self._run(self._tokenizer.decoding(ids, skip_special_tokens=skip_special_tokens), len(ids))

    async def text_and_offsets(self, ids: Sequence[int], *, skip_special_tokens: bool) -> tuple[str, list[int]]:
        """Decode `ids`, and find where in the text the text of each token begins."""
        return await self._run(self._tokenizer.text_and_offsets(ids, skip_special_tokens=skip_special_tokens), len(ids))

    async def offsets_in(self, text: str, ids: Sequence[int]) -> list[int]:
        """Find where in `text` the text of each of its tokens `ids` begins.

        The special tokens around the text are not part of it: those before it begin at 0, and those after it at its end.
        """
        num_before, num_after = self._tokenizer.num_around(text)
        inner = ids[num_before : len(ids) - num_after]
        decoded, offsets = await self.text_and_offsets(inner, skip_special_tokens=False)
        if decoded != text:  # the tokenizer changes the text, such as by Unicode normalisation
            offsets = await self._in_lane(self._long, partial(self._tokenizer.offsets_in, text))
        return [0] * num_before + offsets + [len(text)] * num_after

    async def bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return the token sequences that write `words`, at the start of a text and after a space."""
        if sum(map(len, words)) <= INLINE_WORDS:
            return bad_word_tokens(self._tokenizer, words)
        return await self._in_lane(self._short, partial(bad_word_tokens, self._tokenizer, words))

    async def render(self, template: Callable[[], str], weight: int) -> str:
        """Call `template`, which renders a conversation of `weight`, in characters of text, and return the prompt."""
        if weight <= INLINE_CHARS:
            return template()
        return await self._in_lane(self._short if weight <= PIECE_CHARS else self._chat, template)

    async def _run(self, job: Job[T], num_tokens: int) -> T:
        """Run all steps of a job that decodes `num_tokens` tokens."""
        is_long = num_tokens > PIECE_TOKENS
        with self._admitted(8 * num_tokens if is_long else 0):
            lane = self._long if is_long else self._short
            while not job.done:
                await self._step(job, lane)
            return await self._in_lane(lane, job.result)

    async def _exceeds(self, text: str, limit: int) -> bool:
        exceeds = self._tokenizer.exceeds
        return await self._in_lane(self._short, partial(exceeds, text, limit)) if len(text) > HUGE else exceeds(text, limit)

    async def _step(self, job: Job[object], lane: ThreadPoolExecutor) -> None:
        if not await self._in_lane(lane, partial(job.step, HUGE)):
            await self._in_lane(self._huge, job.step)

    async def _in_lane(self, lane: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        """Run `work` in a thread of the pool `lane`. If the caller is cancelled before `work` starts, it never runs."""
        return await asyncio.get_running_loop().run_in_executor(lane, work)

    @contextmanager
    def _admitted(self, num_bytes: int) -> Iterator[None]:
        """Count a long text while its work runs or waits. Work of `num_bytes` 0 is not counted, and is never refused."""
        if num_bytes and self._waiting_bytes and self._waiting_bytes + num_bytes > self._max_waiting_bytes:
            raise Overloaded(
                f"{self._waiting_bytes} bytes of long texts wait to be tokenised, and {num_bytes} more would exceed the limit "
                f"of {self._max_waiting_bytes}: try again later"
            )
        self._waiting_bytes += num_bytes
        try:
            yield
        finally:
            self._waiting_bytes -= num_bytes
