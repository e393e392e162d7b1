"""Stop strings: whatever way a text is cut, the result is that of a naive search of the whole."""

import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st

from runtime.server.stops import StopMatcher


def naive(text: str, stops: list[str], armed_from: int = 0) -> tuple[str, str | None]:
    """Try every end, first end first, longest stop first. A match must end at or past `armed_from`."""
    for end in range(max(1, armed_from), len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def scan(pieces: list[str], stops: list[str], unarmed: int = 0) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    out = ""
    for number, piece in enumerate(pieces):
        text, found = matcher.push(piece, armed=number >= unarmed)
        out += text
        if found is not None:
            return out, found
    return out + matcher.flush(), None


letters = st.text("ab", min_size=0, max_size=30)  # few letters, so that stops overlap themselves
stop_lists = st.lists(st.text("ab", min_size=1, max_size=6), max_size=4)
places = st.lists(st.integers(0, 1000), max_size=12)


@settings(deadline=None)
@given(letters, stop_lists, places)
@example("aabaab", ["aab", "ab"], [1, 2, 3])
def test_agrees_with_a_naive_search(text, stops, places):
    assert scan(cut(text, places), stops) == naive(text, stops)


@settings(deadline=None)
@given(letters, stop_lists, places, st.integers(0, 8))
def test_matches_that_end_in_the_first_pieces_are_ignored(text, stops, places, unarmed):
    pieces = cut(text, places)
    before = len("".join(pieces[:unarmed]))
    assert scan(pieces, stops, unarmed) == naive(text, stops, before + 1)


@settings(deadline=None)
@given(letters, st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4), places)
def test_holds_back_no_more_than_may_become_a_stop(text, stops, places):
    matcher = StopMatcher(stops)
    seen = out = ""
    for piece in cut(text, places):
        certain, found = matcher.push(piece)
        if found is not None:
            return
        seen, out = seen + piece, out + certain
        held = seen[len(out) :]
        assert seen == out + held
        assert not held or any(stop.startswith(held) for stop in stops)


def test_longest_of_those_that_end_together():
    assert scan(["xab", "c"], ["c", "abc", "bc"]) == ("x", "abc")


def test_first_end_wins_over_an_earlier_start():
    assert scan(["abcd"], ["bcd", "c"]) == ("ab", "c")


def test_no_stops_pass_text_through_at_once():
    assert StopMatcher(()).push("anything") == ("anything", None)
