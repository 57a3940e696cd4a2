"""Stop strings in text that arrives in pieces.

Text is read character by character, so how it is cut into pieces changes nothing: the stop string that is complete first
wins, and of two that are complete at the same character the longer. What comes out is the text before it.

The automaton is Aho and Corasick's. Its state is the longest end of the text that could still become a stop string, which is
exactly what must be held back. One step a character, whatever the text and the stop strings are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """The automaton of some stop strings, none of them empty; shared by the outputs of a request."""

    __slots__ = ("depths", "ends", "fails", "nexts")

    def __init__(self, strings: Sequence[str]) -> None:
        # By state; 0 is the root.
        self.nexts: list[dict[str, int]] = [{}]
        self.depths = [0]  # how many of the latest characters the state stands for
        self.ends: list[str | None] = [None]  # the longest stop string that is complete in it
        self.fails = [0]  # the state of the longest proper end of what it stands for
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
        """Breadth first, so that a state's `fail`, which is shallower, is whole before the state needs it."""
        queue = deque(self.nexts[0].values())
        while queue:
            state = queue.popleft()
            if self.ends[state] is None:
                self.ends[state] = self.ends[self.fails[state]]
            for character, following in self.nexts[state].items():
                self.fails[following] = self.step(self.fails[state], character)
                queue.append(following)

    def step(self, state: int, character: str) -> int:
        while True:
            following = self.nexts[state].get(character)
            if following is not None:
                return following
            if state == 0:
                return 0
            state = self.fails[state]


class StopScanner:
    """One output's text. After `matched` is set it takes no more."""

    __slots__ = ("_held", "_state", "_strings", "matched")

    def __init__(self, strings: StopStrings) -> None:
        self._strings = strings
        self._state = 0
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Take `text` and return what has become certain not to belong to a stop string, or stands before one."""
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
        """The text has ended: what was held back belongs to it after all."""
        held, self._held, self._state = self._held, "", 0
        return held
