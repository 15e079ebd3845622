"""However a text is split, it is cut at the same place, and never too much is held back."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from research.qwen.errors import RequestError
from research.qwen.text.stop import StopMatcher


def _cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: the earliest position, then the order of the list."""
    for position in range(len(text)):
        for stop in stops:
            if text.startswith(stop, position):
                return text[:position], stop
    return text, None


def _streamed(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.feed(piece) for piece in pieces) + matcher.flush()
    return shown, matcher.matched


_stops = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


@given(st.text("abc", max_size=14), _stops)
@example("xabcdx", ["abcd", "bc"])
@example("xabcx", ["abcd", "bc"])
@example("ab", ["abc", "ab"])
@example("aab", ["ab"])
@example("ababab", ["ababb", "abab"])
def test_every_split_point(text: str, stops: list[str]) -> None:
    want = _cut(text, stops)
    assert _streamed(list(text), stops) == want
    for first, second in itertools.combinations_with_replacement(range(len(text) + 1), 2):
        assert _streamed([text[:first], text[first:second], text[second:]], stops) == want


@given(st.text("abc", max_size=30), _stops)
def test_holds_back_only_a_possible_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    for position, character in enumerate(text, start=1):
        shown += matcher.feed(character)
        if matcher.matched is not None:
            break
        held = text[len(shown) : position]
        assert held == "" or any(stop != held and stop.startswith(held) for stop in stops)


def test_a_match_ends_the_stream_at_once() -> None:
    matcher = StopMatcher(["Observation:", "\n\n"])
    assert matcher.feed("Action: x\nObs") == "Action: x\n"
    assert matcher.feed("ervation") == ""
    assert matcher.feed(": y") == ""
    assert matcher.matched == "Observation:"
    assert matcher.feed("more") == matcher.flush() == ""


def test_text_that_only_looked_like_a_stop_is_shown() -> None:
    matcher = StopMatcher(["<end>"])
    assert matcher.feed("a <e") == "a "
    assert matcher.feed("m>") == "<em>"
    assert matcher.feed(" <en") == " "
    assert matcher.flush() == "<en"
    assert matcher.matched is None


def test_no_stops_and_a_bare_string() -> None:
    assert StopMatcher([]).feed("text") == "text"
    matcher = StopMatcher("stop")
    assert matcher.feed("a stop b") == "a "
    assert matcher.matched == "stop"


def test_empty_stop_is_refused() -> None:
    with pytest.raises(RequestError, match="stop"):
        StopMatcher(["a", ""])
