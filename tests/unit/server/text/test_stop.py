import time

from hypothesis import given
from hypothesis import strategies as st

from server.text.stop import StopScanner, StopStrings

STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)
PIECES = st.lists(st.text("abc", max_size=6), max_size=12)


def naive(text, stops):
    """What comes first by its last character; of those that end together, the longest."""
    ends = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end - len(stop)], stop


@given(PIECES, STOPS)
def test_any_cutting_of_the_text_equals_one_search_in_all_of_it(pieces, stops):
    scanner = StopScanner(StopStrings(stops))
    out = "".join([scanner.feed(piece) for piece in pieces]) + scanner.flush()
    assert (out, scanner.matched) == naive("".join(pieces), stops)


@given(PIECES, STOPS)
def test_what_is_held_back_is_exactly_what_could_still_become_a_stop_string(pieces, stops):
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


def test_a_stop_string_across_tokens_is_left_out():
    scanner = StopScanner(StopStrings(["\nUser:"]))
    assert [scanner.feed(piece) for piece in ("Hello", ".\n", "Us", "er", ": hi")] == ["Hello", ".", "", "", ""]
    assert scanner.matched == "\nUser:"
    assert scanner.flush() == ""


def test_text_after_a_match_is_dropped():
    scanner = StopScanner(StopStrings(["x"]))
    assert scanner.feed("axb") == "a"
    assert scanner.feed("c") == ""


def test_the_shorter_stop_string_ends_the_text_before_the_longer_one_is_complete():
    scanner = StopScanner(StopStrings(["abcd", "bc"]))
    assert scanner.feed("abcd") == "a"
    assert scanner.matched == "bc"


def test_time_is_linear_where_a_search_from_every_position_would_not_be():
    stops = StopStrings(["a" * 4000 + "b", "a" * 3999 + "c"])
    scanner = StopScanner(stops)
    began = time.perf_counter()
    for _ in range(2000):
        scanner.feed("a" * 50)
    assert time.perf_counter() - began < 2.0  # 100,000 characters take 0.02 s; times 4000 would be a minute
    assert len(scanner.flush()) == 4000
