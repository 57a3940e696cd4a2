from hypothesis import given
from hypothesis import strategies as st

from server.text.stop import StopScanner, StopStrings

STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)
PIECES = st.lists(st.text("abc", max_size=6), max_size=12)


def naive(text, stops):
    """Search the whole text for the stop string that ends first. Of several that end together, the longest wins.

    Returns the text before the stop string, and the stop string or None.
    """
    ends = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end - len(stop)], stop


@given(PIECES, STOPS)
def test_pieces_of_a_text_give_the_result_of_one_search_in_the_whole_text(pieces, stops):
    scanner = StopScanner(StopStrings(stops))
    out = "".join([scanner.feed(piece) for piece in pieces]) + scanner.flush()
    assert (out, scanner.matched) == naive("".join(pieces), stops)


@given(PIECES, STOPS)
def test_exactly_the_text_that_could_become_a_stop_string_is_held_back(pieces, stops):
    scanner = StopScanner(StopStrings(stops))
    text = out = ""
    for piece in pieces:
        text += piece
        out += scanner.feed(piece)
        if scanner.matched is not None:
            return
        held = text[len(out) :]
        assert out + held == text
        longest = max((n for s in stops for n in range(len(s)) if text.endswith(s[:n])), default=0)
        assert len(held) == longest


def test_a_stop_string_across_pieces_is_left_out():
    scanner = StopScanner(StopStrings(["\nUser:"]))
    assert [scanner.feed(piece) for piece in ("Hello", ".\n", "Us", "er", ": hi")] == ["Hello", ".", "", "", ""]
    assert scanner.matched == "\nUser:"
    assert scanner.flush() == ""


def test_text_after_a_match_is_dropped():
    scanner = StopScanner(StopStrings(["x"]))
    assert scanner.feed("axb") == "a"
    assert scanner.feed("c") == ""


def test_the_stop_string_that_is_complete_first_wins():
    scanner = StopScanner(StopStrings(["abcd", "bc"]))
    assert scanner.feed("abcd") == "a"
    assert scanner.matched == "bc"


class CountingStops(StopStrings):
    """The automaton of stop strings, with a count of the states that it visits (`num_looks`)."""

    def __init__(self, strings):
        super().__init__(strings)
        self.num_looks = 0
        self.nexts = [self._Row(self, row) for row in self.nexts]

    class _Row(dict):
        def __init__(self, counter, row):
            super().__init__(row)
            self._counter = counter

        def get(self, character):
            self._counter.num_looks += 1
            return super().get(character)


def test_the_work_is_linear_where_a_search_from_every_position_would_not_be():
    stops = CountingStops(["a" * 4000 + "b", "a" * 3999 + "c"])
    scanner = StopScanner(stops)
    for _ in range(400):
        scanner.feed("a" * 50)
    assert stops.num_looks <= 2 * 400 * 50
    assert len(scanner.flush()) == 4000


SAID = st.lists(st.tuples(st.text("abc", min_size=1, max_size=4), st.booleans()), max_size=12)


def naive_in_two_texts(said, stops):
    """Search all that was said, and what is shown of it, for the stop string that ends first. Returns the text and the stop."""
    characters = [(c, hidden) for text, hidden in said for c in text]
    for end, (_, hidden) in enumerate(characters, 1):
        whole = "".join(c for c, _ in characters[:end])
        shown = "".join(c for c, h in characters[:end] if not h)
        in_whole = [s for s in stops if whole.endswith(s)]
        in_shown = [s for s in stops if shown.endswith(s) and not hidden]
        found = max([*in_whole, *in_shown], key=len, default=None)
        if found in in_whole:
            return "".join(c for c, h in characters[: end - len(found)] if not h), found
        if found is not None:
            return shown[: len(shown) - len(found)], found
    return "".join(c for c, h in characters if not h), None


@given(SAID, STOPS, st.booleans())
def test_stop_strings_are_found_in_what_is_said_and_in_what_is_shown(said, stops, include):
    scanner = StopScanner(StopStrings(stops), include=include)
    out = "".join([scanner.feed(text, hidden=hidden) for text, hidden in said]) + scanner.flush()
    text, found = naive_in_two_texts(said, stops)
    assert (out, scanner.matched) == (text + (found or "") if include else text, found)


@given(SAID, STOPS)
def test_what_is_shown_is_not_held_back_without_need(said, stops):
    scanner = StopScanner(StopStrings(stops))
    whole = out = ""
    for text, hidden in said:
        whole += text
        out += scanner.feed(text, hidden=hidden)
        if scanner.matched is not None:
            return
    shown = "".join(text for text, hidden in said if not hidden)
    longest = max((n for s in stops for n in range(len(s)) if whole.endswith(s[:n]) or shown.endswith(s[:n])), default=0)
    assert len(shown) - len(out) <= longest
