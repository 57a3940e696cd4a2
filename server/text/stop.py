"""Finds stop strings in text that arrives in pieces.

Text is read character by character, so the result does not depend on how it is cut into pieces. The stop string that is
complete first wins. Of two that are complete at the same character, the longer wins. The output is the text before it.

Some text is hidden from the output: that of special tokens. Stop strings are looked for in two texts: in all that the model said,
and in what the output shows of it. So a stop string may contain a special token, and the output never shows a stop string.

The automaton is that of Aho and Corasick. Its state is the longest suffix of the text that could still become a stop string,
which is exactly what must be held back. It costs one step a character, whatever the text and the stop strings are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """The automaton that finds a request's stop strings, none of which is empty. All outputs of the request share it."""

    __slots__ = ("depths", "ends", "fails", "nexts")

    def __init__(self, strings: Sequence[str]) -> None:
        # Each of the four lists has one element for each state of the automaton. State 0 is the root.
        self.nexts: list[dict[str, int]] = [{}]
        self.depths = [0]  # for each state, the number of latest characters that it stands for
        self.ends: list[str | None] = [None]  # for each state, the longest stop string that is complete in it
        self.fails = [0]  # for each state, the state of the longest proper suffix of its characters
        for string in strings:
            self._add(string)
        self._link()

    def _add(self, string: str) -> None:
        state = 0
        for character in string:
            following = self.nexts[state].get(character)
            if following is None:
                following = self.nexts[state][character] = len(self.nexts)
                self.nexts.append({})
                self.depths.append(self.depths[state] + 1)
                self.ends.append(None)
                self.fails.append(0)
            state = following
        self.ends[state] = string

    def _link(self) -> None:
        """Fill in `fails`, breadth first: the fail state of a state is shallower, so it is complete when it is needed."""
        queue = deque(self.nexts[0].values())
        while queue:
            state = queue.popleft()
            if self.ends[state] is None:
                self.ends[state] = self.ends[self.fails[state]]
            for character, following in self.nexts[state].items():
                self.fails[following] = self.step(self.fails[state], character)
                queue.append(following)

    def step(self, state: int, character: str) -> int:
        """Return the automaton's next state when it reads `character` in `state`."""
        while True:
            following = self.nexts[state].get(character)
            if following is not None:
                return following
            if state == 0:
                return 0
            state = self.fails[state]


class StopScanner:
    """Searches the text of one output for stop strings. `matched` is the stop string found; all text after it is dropped."""

    __slots__ = ("_held", "_hidden", "_include", "_said", "_shown", "_strings", "matched")

    def __init__(self, strings: StopStrings, *, include: bool = False) -> None:
        """With `include`, the output ends after the stop string, and shows all of it."""
        self._strings = strings
        self._include = include
        self._said = 0  # state of the automaton after all that the model said
        self._shown = 0  # its state after the text that is not hidden. The two are equal if no held text is hidden
        self._held = ""  # the latest text said, which may still belong to a stop string
        self._hidden: list[bool] = []  # for each character of `_held`, whether it is hidden; empty if none is
        self.matched: str | None = None

    def feed(self, text: str, *, hidden: bool = False) -> str:
        """Search `text`, and return the text that is certain: it cannot belong to a stop string, or stands before one.

        `hidden` text is said by the model, and not shown in the output.
        """
        if self.matched is not None or not text:
            return ""
        if hidden or self._hidden:
            return self._feed_both(text, hidden)
        strings = self._strings
        root, step, ends = strings.nexts[0], strings.step, strings.ends
        state = self._said
        for at, character in enumerate(text):
            if state == 0:
                if character not in root:
                    continue
                state = root[character]
            else:
                state = step(state, character)
            found = ends[state]
            if found is not None:
                whole = self._held + text[: at + 1]
                return self._match(found, whole[: len(whole) - len(found)])
        self._said = self._shown = state
        whole = self._held + text
        certain = len(whole) - strings.depths[state]
        self._held = whole[certain:]
        return whole[:certain]

    def flush(self) -> str:
        """Return the text that is still held back. Called at the end of the output, when no stop string can be completed."""
        held = _visible(self._held, self._hidden)
        self._drop()
        return held

    def _feed_both(self, text: str, hidden: bool) -> str:
        """Do the work of `feed` for text some of which is hidden."""
        step, ends = self._strings.step, self._strings.ends
        held, flags = self._held, self._hidden or [False] * len(self._held)
        for character in text:
            held += character
            flags.append(hidden)
            self._said = step(self._said, character)
            found, num = ends[self._said], 0
            if found is not None:
                num = len(found)
            if not hidden:
                self._shown = step(self._shown, character)
                shown = ends[self._shown]
                if shown is not None and (found is None or len(shown) > len(found)):
                    found, num = shown, _num_said(flags, len(shown))
            if found is not None:
                return self._match(found, _visible(held[: len(held) - num], flags[: len(flags) - num]))
        depths = self._strings.depths
        certain = len(held) - max(depths[self._said], _num_said(flags, depths[self._shown]))
        text = _visible(held[:certain], flags[:certain])
        self._held, flags = held[certain:], flags[certain:]
        self._hidden = flags if any(flags) else []
        return text

    def _match(self, found: str, before: str) -> str:
        self.matched = found
        self._drop()
        return before + found if self._include else before

    def _drop(self) -> None:
        self._held, self._hidden, self._said, self._shown = "", [], 0, 0


def _visible(text: str, hidden: list[bool]) -> str:
    """Return the characters of `text` that are not hidden."""
    return "".join([c for c, is_hidden in zip(text, hidden, strict=True) if not is_hidden]) if hidden else text


def _num_said(hidden: list[bool], num_shown: int) -> int:
    """Return how many of the last characters said hold the last `num_shown` characters that are not hidden."""
    num = 0
    for is_hidden in reversed(hidden):
        if not num_shown:
            break
        num += 1
        num_shown -= not is_hidden
    return num
