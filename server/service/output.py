"""One output of a request: the engine's events become chunks of text, cut at the first stop string."""

from __future__ import annotations

from engine.request import TokenEvent
from server.service.types import Chunk
from server.text.detokenizer import Detokenizer
from server.text.stop import StopScanner


class Output:
    """`num_tokens` counts what was generated, up to and including the token that completed a stop string.

    A chunk's token ids and logprobs are those of all tokens so far, that token and a stop token included; its text ends before
    the stop string, has no stop token's text, and lags behind while more could still become a stop string or a character.
    """

    __slots__ = ("_bare_tokens", "_detokenizer", "_index", "_named_stop_ids", "_scanner", "finish_reason", "num_tokens")

    def __init__(
        self,
        index: int,
        detokenizer: Detokenizer,
        scanner: StopScanner | None,
        *,
        min_tokens: int,
        named_stop_ids: tuple[int, ...],
    ) -> None:
        self._index = index
        self._detokenizer = detokenizer
        self._scanner = scanner
        self._bare_tokens = max(0, min_tokens - 1)  # whose text is not searched for stop strings
        self._named_stop_ids = named_stop_ids
        self.num_tokens = 0
        self.finish_reason: str | None = None

    def take(self, event: TokenEvent) -> Chunk:
        """Not after `finish_reason` is set."""
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
        return self._take_with_stops(event)

    def _take_with_stops(self, event: TokenEvent) -> Chunk:
        spoken = event.tokens if event.stop_token is None else event.tokens[:-1]
        text, num = self._scan(spoken)
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
        """The text that `tokens` let out, and how many of them it took to complete a stop string."""
        scanner = self._scanner
        if scanner is None:
            return self._detokenizer.add(tokens), len(tokens)
        parts = []
        for i, token in enumerate(tokens):
            piece = self._detokenizer.add([token])
            parts.append(piece if self.num_tokens + i < self._bare_tokens else scanner.feed(piece))
            if scanner.matched is not None:
                return "".join(parts), i + 1
        return "".join(parts), len(tokens)

    def _finish_text(self) -> str:
        rest = self._detokenizer.flush()
        if self._scanner is None:
            return rest
        text = self._scanner.feed(rest)
        return text + self._scanner.flush()
