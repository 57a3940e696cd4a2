"""OutputBuilder turns the engine's events of one output into chunks of text, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from engine.request import TokenEvent, TokenLogprobs
from server.service.types import Chunk, GenerationRequest
from server.text.stop import StopScanner, StopStrings
from server.text.tokenizer import Tokenizer


class OutputBuilder:
    """Builds output `index` of a request, chunk by chunk. `num_tokens` counts the generated tokens, up to and including the token
    that completed a stop string.

    A chunk has the ids and log-probabilities of all tokens so far, also of the token that completed a stop string and of a
    stop token. The chunk's text ends before the stop string and leaves out a stop token, unless the request includes them. Text
    that may still become part of a stop string or of a character comes with a later chunk.
    """

    __slots__ = (
        "_by_token",
        "_detokenizer",
        "_index",
        "_is_plain",
        "_num_unscanned",
        "_offsets",
        "_prompt",
        "_request",
        "_said_length",
        "_scanner",
        "_text",
        "finish_reason",
        "num_tokens",
    )

    def __init__(
        self, index: int, request: GenerationRequest, text: Tokenizer, prompt: Sequence[int], stops: StopStrings | None
    ) -> None:
        """`prompt` is the prompt's token ids. `stops` are the request's stop strings, or None if it has none."""
        self._index = index
        self._request = request
        self._text = text
        self._detokenizer = text.detokenizer(prompt, skip_special_tokens=request.skip_special_tokens)
        self._scanner = None if stops is None else StopScanner(stops, include=request.include_stop_str_in_output)
        self._num_unscanned = max(0, request.params.min_tokens - 1)  # the text of the first tokens is not searched for stops
        self._offsets = _Offsets() if request.text_offsets else None
        self._prompt = list(prompt) if request.return_token_ids else None  # until the first chunk has it
        self._by_token = self._scanner is not None or self._offsets is not None
        self._is_plain = not self._by_token and self._prompt is None
        self._said_length = 0  # length of the text of all tokens so far, in characters; what a stop string cuts off counts
        self.num_tokens = 0
        self.finish_reason: str | None = None

    def add(self, event: TokenEvent) -> Chunk:
        """Turn one event into a chunk. Must not be called after `finish_reason` is set."""
        if self._is_plain and event.finish is None:
            tokens = event.tokens
            self.num_tokens += len(tokens)
            text = self._detokenizer.add(tokens)
            return Chunk(
                index=self._index,
                text=text,
                token_ids=tokens,
                logprobs=event.logprobs,
                prompt_logprobs=event.prompt_logprobs,
            )
        return self._add_slowly(event)

    def _add_slowly(self, event: TokenEvent) -> Chunk:
        text, starts, num = self._read(event)
        self.num_tokens += num
        matched = None if self._scanner is None else self._scanner.matched
        stop_reason: str | int | None = matched
        if matched is not None:
            self.finish_reason = "stop"
        elif event.finish is not None:
            self.finish_reason = event.finish.value
            stop_reason = event.stop_token if event.stop_token in self._request.params.stop_token_ids else None
        tokens, offsets = event.tokens[:num], None
        logprobs = None if event.logprobs is None else event.logprobs[:num]
        if self._offsets is not None and logprobs is not None:
            tokens, logprobs, offsets = self._offsets.add(logprobs, starts, text, ended=self.finish_reason is not None)
        prompt, self._prompt = self._prompt, None
        self._is_plain = not self._by_token
        return Chunk(
            index=self._index,
            text=text,
            token_ids=tokens,
            finish_reason=self.finish_reason,
            stop_reason=stop_reason,
            logprobs=logprobs,
            prompt_logprobs=event.prompt_logprobs,
            text_offsets=offsets,
            prompt_token_ids=prompt,
        )

    def _read(self, event: TokenEvent) -> tuple[str, list[int], int]:
        """Decode the tokens of `event` and search their text for stop strings.

        Returns the text that is certain now, where the text of each token begins in all that was said, and the number of tokens
        up to the end of a stop string (all, if there is none).
        """
        tokens, scanner = event.tokens, self._scanner
        # The last token has no text if it is a stop token, unless the request includes what stops it.
        num_shown = len(tokens) - (event.stop_token is not None and not self._request.include_stop_str_in_output)
        parts: list[str] = []
        starts: list[int] = []
        if not self._by_token:
            parts.append(self._detokenizer.add(tokens[:num_shown]))
        else:
            for i, token in enumerate(tokens):
                hidden = i >= num_shown
                starts.append(self._said_length + (0 if hidden else self._detokenizer.chars_before(token)))
                parts.append(self._say(token, self.num_tokens + i, hidden=hidden))
                if scanner is not None and scanner.matched is not None:
                    return "".join(parts), starts, i + 1
        if event.finish is not None:
            rest = self._detokenizer.flush()
            parts.append(rest if scanner is None else scanner.feed(rest) + scanner.flush())
        return "".join(parts), starts, len(tokens)

    def _say(self, token: int, position: int, *, hidden: bool) -> str:
        """Return the text that is certain once the model has said `token`, the output's token number `position`."""
        scanner = self._scanner
        unseen = self._text.token_text(token) if hidden else ""
        piece = "" if hidden else self._detokenizer.add([token])
        self._said_length += len(piece)
        if scanner is None or position < self._num_unscanned:
            return piece
        if not piece and self._request.skip_special_tokens:
            unseen = unseen or self._text.special_text(token)
        return scanner.feed(unseen, hidden=True) if unseen else scanner.feed(piece)


class _Offsets:
    """Finds where the text of each token begins in the output. Tokens are held back until that is certain.

    A stop string cuts off text, and a token of that text begins where the output ends. So a token is certain once the text before
    it is.
    """

    __slots__ = ("_held", "_length")

    def __init__(self) -> None:
        self._length = 0  # length of the output's text that is certain
        self._held: list[tuple[TokenLogprobs, int]] = []  # tokens, and where their text begins in all that was said

    def add(
        self, logprobs: list[TokenLogprobs], starts: list[int], text: str, *, ended: bool
    ) -> tuple[list[int], list[TokenLogprobs] | None, list[int]]:
        """Add tokens by their log-probabilities, and the text that became certain with them.

        Returns the ids, log-probabilities and offsets of the tokens that are certain; no log-probabilities if there are none.
        """
        self._length += len(text)
        held = self._held
        held += zip(logprobs, starts[: len(logprobs)], strict=True)
        num = len(held) if ended else next((i for i, (_, start) in enumerate(held) if start > self._length), len(held))
        certain, self._held = held[:num], held[num:]
        found = [position for position, _ in certain]
        offsets = [min(start, self._length) for _, start in certain]
        return [position.token for position in found], found if found or ended else None, offsets
