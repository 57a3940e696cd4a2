"""OutputBuilder turns the engine's events of one output into chunks of text, cut at the first stop string."""

from __future__ import annotations

from engine.request import TokenEvent
from server.service.types import Chunk
from server.text.detokenizer import Detokenizer
from server.text.stop import StopScanner


class OutputBuilder:
    """Builds output `index` of a request, chunk by chunk. `num_tokens` counts the generated tokens, up to and including the token
    that completed a stop string.

    A chunk has the ids and log-probabilities of all tokens so far, also of the token that completed a stop string and of a
    stop token. The chunk's text ends before the stop string and leaves out a stop token. Text that may still become part of
    a stop string or of a character comes with a later chunk.
    """

    __slots__ = ("_detokenizer", "_index", "_named_stop_ids", "_num_unscanned", "_scanner", "finish_reason", "num_tokens")

    def __init__(
        self,
        index: int,
        detokenizer: Detokenizer,
        scanner: StopScanner | None,
        *,
        min_tokens: int,
        named_stop_ids: tuple[int, ...],
    ) -> None:
        """`scanner` is None for a request without stop strings. `named_stop_ids` are the stop tokens that the client named."""
        self._index = index
        self._detokenizer = detokenizer
        self._scanner = scanner
        self._num_unscanned = max(0, min_tokens - 1)  # the text of this many first tokens is not searched for stop strings
        self._named_stop_ids = named_stop_ids
        self.num_tokens = 0
        self.finish_reason: str | None = None

    def add(self, event: TokenEvent) -> Chunk:
        """Turn one event into a chunk. Must not be called after `finish_reason` is set."""
        tokens = event.tokens
        if self._scanner is None and event.finish is None:
            self.num_tokens += len(tokens)
            text = self._detokenizer.add(tokens)
            return Chunk(
                index=self._index,
                text=text,
                token_ids=tokens,
                logprobs=event.logprobs,
                prompt_logprobs=event.prompt_logprobs,
            )
        return self._add_with_stops(event)

    def _add_with_stops(self, event: TokenEvent) -> Chunk:
        with_text = event.tokens if event.stop_token is None else event.tokens[:-1]
        text, num = self._scan(with_text)
        matched = self._scanner.matched if self._scanner is not None else None
        if matched is None:
            num = len(event.tokens)
            if event.finish is not None:
                text += self._finish_text()
                matched = self._scanner.matched if self._scanner is not None else None
        self.num_tokens += num
        stop_reason: str | int | None = matched
        if matched is not None:
            self.finish_reason = "stop"
        elif event.finish is not None:
            self.finish_reason = event.finish.value
            stop_reason = event.stop_token if event.stop_token in self._named_stop_ids else None
        return Chunk(
            index=self._index,
            text=text,
            token_ids=event.tokens[:num],
            finish_reason=self.finish_reason,
            stop_reason=stop_reason,
            logprobs=None if event.logprobs is None else event.logprobs[:num],
            prompt_logprobs=event.prompt_logprobs,
        )

    def _scan(self, tokens: list[int]) -> tuple[str, int]:
        """Decode `tokens` and search their text for stop strings.

        Returns the text that is certain now, and the number of tokens up to the end of a stop string (all, if there is none).
        """
        scanner = self._scanner
        if scanner is None:
            return self._detokenizer.add(tokens), len(tokens)
        parts = []
        for i, token in enumerate(tokens):
            piece = self._detokenizer.add([token])
            parts.append(piece if self.num_tokens + i < self._num_unscanned else scanner.feed(piece))
            if scanner.matched is not None:
                return "".join(parts), i + 1
        return "".join(parts), len(tokens)

    def _finish_text(self) -> str:
        """Return the text that the detokenizer and the stop scanner still hold back."""
        rest = self._detokenizer.flush()
        if self._scanner is None:
            return rest
        text = self._scanner.feed(rest)
        return text + self._scanner.flush()
