"""A stream of text ends before the first stop text, however the text is cut into pieces."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from flashclient.generation.stop_texts import until_stop

LETTERS = st.text("ab;", max_size=20)
STOPS = st.lists(st.text("ab;", min_size=1, max_size=4), max_size=3)


@given(st.lists(LETTERS, max_size=8), STOPS)
def test_the_text_before_the_first_stop_text(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    ends = [text.index(stop) for stop in stops if stop in text]
    given_out = "".join(until_stop(iter(pieces), stops))
    if not ends:
        assert given_out == text
    else:
        assert any(given_out == text[:end] for end in {text.index(stop) for stop in stops if stop in text})
        assert not any(stop in given_out for stop in stops)


def test_nothing_is_held_back_that_cannot_become_a_stop_text() -> None:
    assert list(until_stop(iter(["one ", "two#", " three", "##"]), ["##"])) == ["one ", "two", "# three"]


def test_the_stream_is_closed_at_the_stop_text() -> None:
    closed = []

    def pieces() -> Iterator[str]:
        try:
            yield "a"
            yield "b;"
            raise AssertionError("nothing more is asked for")
        finally:
            closed.append(True)

    assert list(until_stop(pieces(), [";"])) == ["a", "b"]
    assert closed == [True]
