"""Makes prompts: random token ids, or random words for endpoints that take text. The same seed makes the same prompts."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from loadtest.plan import PREFIX, PROMPT, SESSION, Order, Plan
from loadtest.record import Reading
from loadtest.spec import Target

Ids = NDArray[np.int32]
FIRST_ID = 10  # the ids below are often special tokens
_SESSION_PROMPTS = 1 << 40  # sessions' prompts begin at this index, above those of single requests

# Common English words, so that a tokenizer splits few of them.
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand part place "
    "case week company system program question work government number night point home water room mother area money story fact "
    "month lot right study book eye job word business issue side kind head house service friend father power hour game line end "
    "member law car city community name president team minute idea body information back parent face others level office door "
    "health person art war history party result change morning reason research girl guy moment air teacher force education"
)
WORDS = tuple(_TEXT.split())


class Prompt(NamedTuple):
    """A prompt in the form that the route takes."""

    ids: Ids | None = None
    text: str | None = None
    messages: list[dict[str, str]] | None = None


class Conversation(Protocol):
    """The context of a session. Each prompt holds everything before it."""

    def ask(self, num_tokens: int) -> Prompt: ...

    def answered(self, reading: Reading) -> None: ...

    def fork(self, key: int) -> Conversation: ...


class Prompts:
    def __init__(self, plan: Plan, target: Target) -> None:
        self._plan = plan
        self._target = target
        self._text = target.as_text or target.route == "chat"
        self._prefixes: dict[int, Ids] = {}

    def of(self, order: Order) -> Prompt:
        """Return the prompt of a single request: the shared prefix, then tokens of its own."""
        rng = self._plan.rng(PROMPT, order.number)
        if not self._text:
            return Prompt(ids=np.concatenate([self.prefix(order.prefix), self.ids(rng, order.prompt_tokens)]))
        length = order.prompt_tokens - self._target.template_tokens
        prefix = self.words(self._plan.rng(PREFIX, order.prefix), self._plan.load.prefix)
        text = " ".join(filter(None, [prefix, self.words(rng, length)]))
        return Prompt(messages=[{"role": "user", "content": text}]) if self._target.route == "chat" else Prompt(text=text)

    def conversation(self, session: int) -> Conversation:
        """Return the empty context of session `session`. All sessions begin with the shared prefix 0."""
        rng = self._plan.rng(SESSION, _SESSION_PROMPTS + session)
        if not self._text:
            return IdConversation(self, self.prefix(0), rng)
        prefix = self.words(self._plan.rng(PREFIX, 0), self._plan.load.prefix)
        if self._target.route == "chat":
            return ChatConversation(self, [{"role": "system", "content": prefix}] if prefix else [], rng)
        return TextConversation(self, prefix, rng)

    def fork_rng(self, key: int) -> np.random.Generator:
        return self._plan.rng(SESSION, _SESSION_PROMPTS + key)

    def prefix(self, number: int) -> Ids:
        if number not in self._prefixes:
            self._prefixes[number] = self.ids(self._plan.rng(PREFIX, number), self._plan.load.prefix)
        return self._prefixes[number]

    def ids(self, rng: np.random.Generator, num: int) -> Ids:
        return rng.integers(FIRST_ID, self._target.vocab, size=num, dtype=np.int32)

    def words(self, rng: np.random.Generator, num_tokens: float) -> str:
        """Return random words that the endpoint's tokenizer makes about `num_tokens` tokens of."""
        if num_tokens <= 0:
            return ""
        num = max(1, math.floor(num_tokens / self._target.tokens_per_word + 0.5))
        return " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=num))


class IdConversation:
    """A context of token ids. An answer whose ids the route does not report is replaced by as many random ids."""

    def __init__(self, prompts: Prompts, ids: Ids, rng: np.random.Generator) -> None:
        self._prompts, self._ids, self._rng = prompts, ids, rng

    def ask(self, num_tokens: int) -> Prompt:
        self._ids = np.concatenate([self._ids, self._prompts.ids(self._rng, num_tokens)])
        return Prompt(ids=self._ids)

    def answered(self, reading: Reading) -> None:
        answer = np.array(reading.answer_ids, dtype=np.int32)
        if not len(answer):
            answer = self._prompts.ids(self._rng, reading.output_tokens or len(reading.events))
        self._ids = np.concatenate([self._ids, answer])

    def fork(self, key: int) -> IdConversation:
        return IdConversation(self._prompts, self._ids, self._prompts.fork_rng(key))


class TextConversation:
    """A context of plain text."""

    def __init__(self, prompts: Prompts, text: str, rng: np.random.Generator) -> None:
        self._prompts, self._text, self._rng = prompts, text, rng

    def ask(self, num_tokens: int) -> Prompt:
        self._text = " ".join(filter(None, [self._text, self._prompts.words(self._rng, num_tokens)]))
        return Prompt(text=self._text)

    def answered(self, reading: Reading) -> None:
        self._text += "".join(reading.answer_text)

    def fork(self, key: int) -> TextConversation:
        return TextConversation(self._prompts, self._text, self._prompts.fork_rng(key))


class ChatConversation:
    """A context of chat messages."""

    def __init__(self, prompts: Prompts, messages: list[dict[str, str]], rng: np.random.Generator) -> None:
        self._prompts, self._messages, self._rng = prompts, messages, rng

    def ask(self, num_tokens: int) -> Prompt:
        self._messages = [*self._messages, {"role": "user", "content": self._prompts.words(self._rng, num_tokens)}]
        return Prompt(messages=self._messages)

    def answered(self, reading: Reading) -> None:
        self._messages = [*self._messages, {"role": "assistant", "content": "".join(reading.answer_text)}]

    def fork(self, key: int) -> ChatConversation:
        return ChatConversation(self._prompts, self._messages, self._prompts.fork_rng(key))
