"""Ends a stream of text at the first of some texts, which is not part of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


class StopTexts:
    """Holds back what may become a stop text.

    Args:
        texts: that end the stream; not empty.

    Attributes:
        found: the stop text that ended the stream; None so far.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)
        self._held = ""
        self.found: str | None = None

    def add(self, piece: str) -> str:
        """The text that can be given out after `piece`."""
        text = self._held + piece
        begins = {text.index(stop): stop for stop in self._texts if stop in text}
        if begins:
            first = min(begins)
            self._held, self.found = "", begins[first]
            return text[:first]
        end = len(text) - self._possible(text)
        self._held = text[end:]
        return text[:end]

    def rest(self) -> str:
        """What was held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held

    def _possible(self, text: str) -> int:
        """The length of the longest end of `text` that is the beginning of a stop text."""
        longest = max((len(stop) - 1 for stop in self._texts), default=0)
        ends = range(min(longest, len(text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self._texts)), 0)


def until_stop(pieces: Iterator[str], texts: Sequence[str]) -> Iterator[str]:
    """The pieces up to the first stop text. Closes `pieces` there, so that nothing more is computed."""
    stops = StopTexts(texts)
    try:
        for piece in pieces:
            if text := stops.add(piece):
                yield text
            if stops.found is not None:
                return
        if text := stops.rest():
            yield text
    finally:
        close = getattr(pieces, "close", None)
        if close is not None:
            close()
