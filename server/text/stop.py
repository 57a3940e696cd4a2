"""Finds stop strings in text that arrives in pieces.

Text is read character by character, so the result does not depend on how it is cut into pieces. The stop string that is
complete first wins. Of two that are complete at the same character, the longer wins. The output is the text before it.

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

    __slots__ = ("_held", "_state", "_strings", "matched")

    def __init__(self, strings: StopStrings) -> None:
        self._strings = strings
        self._state = 0
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Search `text`, and return the text that is certain: it cannot belong to a stop string, or stands before one."""
        if self.matched is not None or not text:
            return ""
        strings = self._strings
        root, step, ends = strings.nexts[0], strings.step, strings.ends
        state = self._state
        for at, character in enumerate(text):
            if state == 0:
                if character not in root:
                    continue
                state = root[character]
            else:
                state = step(state, character)
            found = ends[state]
            if found is not None:
                self.matched = found
                whole = self._held + text[: at + 1]
                self._held = ""
                return whole[: len(whole) - len(found)]
        self._state = state
        whole = self._held + text
        certain = len(whole) - strings.depths[state]
        self._held = whole[certain:]
        return whole[:certain]

    def flush(self) -> str:
        """Return the text that is still held back. Called at the end of the output, when no stop string can be completed."""
        held, self._held, self._state = self._held, "", 0
        return held
