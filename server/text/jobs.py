"""Jobs that tokenise a long text or decode many token ids in steps. Other work can run between two steps.

A step of the usual size takes some milliseconds and a few megabytes. A text without a safe cut, and token ids that cannot be
decoded in pieces, are one large step.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from server.text.detokenizer import Detokenizer

Result_co = TypeVar("Result_co", covariant=True)


class Job(Protocol[Result_co]):
    """Text work that is done in steps. `step` and `result` may run in any thread, but only one call at a time."""

    @property
    def done(self) -> bool:
        """True if no step is left."""

    def step(self, largest: int | None = None) -> bool:
        """Run the next step. If its input is longer than `largest`, do nothing and return False."""

    def result(self) -> Result_co:
        """Return the result of the job. Must be called only when no step is left."""


class EncodeJob:
    """Tokenises a text in steps of one piece. The ids of all pieces together are exactly those of the whole text."""

    def __init__(
        self, pieces: Iterator[str], encode: Callable[[str], array[int]], frame: Callable[[array[int]], list[int]]
    ) -> None:
        """`pieces` has at least one piece. `frame` puts the special tokens around the ids of the whole text."""
        self._pieces = pieces
        self._encode = encode
        self._frame = frame
        self._piece: str | None = None  # the next piece, once it was cut
        self._ids: array[int] = array("i")
        self.done = False

    @property
    def num_tokens(self) -> int:
        """Number of token ids of the pieces tokenised so far, without the special tokens around the text."""
        return len(self._ids)

    def step(self, largest: int | None = None) -> bool:
        if self._piece is None:
            self._piece = next(self._pieces)
        if largest is not None and len(self._piece) > largest:
            return False
        self._ids += self._encode(self._piece)
        self._piece = next(self._pieces, None)
        self.done = self._piece is None
        return True

    def result(self) -> list[int]:
        return self._frame(self._ids)


class DecodeJob:
    """Decodes token ids in steps of `piece_tokens` ids. The texts of all steps together are exactly the text of all ids."""

    def __init__(self, ids: Sequence[int], detokenizer: Detokenizer, piece_tokens: int) -> None:
        self._ids = ids
        self._detokenizer = detokenizer
        self._piece_tokens = piece_tokens
        self._at = 0
        self._parts: list[str] = []
        self.done = False

    def step(self, largest: int | None = None) -> bool:
        piece = self._ids[self._at : self._at + self._piece_tokens]
        if largest is not None and len(piece) > largest:
            return False
        self._parts.append(self._detokenizer.add(piece))
        self._at += len(piece)
        if self._at >= len(self._ids):
            self._parts.append(self._detokenizer.flush())
            self.done = True
        return True

    def result(self) -> str:
        return "".join(self._parts)


class OffsetsJob:
    """Decodes token ids in steps, one id at a time. The result is the text, and where in it the text of each token begins.

    A token whose bytes only begin a character begins where the character does.
    """

    def __init__(self, ids: Sequence[int], detokenizer: Detokenizer, piece_tokens: int) -> None:
        self._ids = ids
        self._detokenizer = detokenizer
        self._piece_tokens = piece_tokens
        self._parts: list[str] = []
        self._length = 0
        self._offsets: list[int] = []
        self.done = False

    def step(self, largest: int | None = None) -> bool:
        at = len(self._offsets)
        for token in self._ids[at : at + self._piece_tokens]:
            self._offsets.append(self._length + self._detokenizer.chars_before(token))
            self._add(self._detokenizer.add([token]))
        if len(self._offsets) == len(self._ids):
            self._add(self._detokenizer.flush())
            self.done = True
        return True

    def result(self) -> tuple[str, list[int]]:
        return "".join(self._parts), self._offsets

    def _add(self, text: str) -> None:
        self._parts.append(text)
        self._length += len(text)


def finish(job: Job[Result_co]) -> Result_co:
    """Run all steps of `job` in this thread."""
    while not job.done:
        job.step()
    return job.result()
