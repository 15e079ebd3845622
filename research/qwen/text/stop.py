"""Stop strings in a stream of text: cut at the first one, hold back no more than one could still become."""

from __future__ import annotations

from collections.abc import Sequence

from research.qwen.errors import RequestError


class StopMatcher:
    """Cuts a stream at the earliest stop string, however the text is split.

    The joined results of ``feed`` plus ``flush`` are the text before the stop string that starts earliest; of
    two that start together the one listed first is reported in ``matched``.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """``stops`` may be empty (all text passes) or one bare string.

        Raises:
            RequestError: a stop string is empty.
        """
        self._stops: tuple[str, ...] = (stops,) if isinstance(stops, str) else tuple(stops)
        if not all(self._stops):
            raise RequestError("stop: a stop string must not be empty")
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """Take more text, return what is safe to show now; nothing once a stop string matched."""
        if self.matched is not None:
            return ""
        buffer = self._held + text
        found = self._first_match(buffer)
        open_start = self._first_open(buffer)
        # An open prefix wins over a match if it starts earlier, or together but is listed earlier.
        if found is not None and (open_start is None or found < open_start):
            return self._cut(buffer, found)
        safe = len(buffer) if open_start is None else open_start[0]
        self._held = buffer[safe:]
        return buffer[:safe]

    def flush(self) -> str:
        """End of the stream: return what was held back, up to a stop string in it."""
        buffer, self._held = self._held, ""
        if self.matched is not None:
            return ""
        found = self._first_match(buffer)
        return buffer if found is None else self._cut(buffer, found)

    def _cut(self, buffer: str, found: tuple[int, int]) -> str:
        self._held = ""
        self.matched = self._stops[found[1]]
        return buffer[: found[0]]

    def _first_match(self, buffer: str) -> tuple[int, int] | None:
        """(position, index of the stop string) of the earliest full match."""
        matches = [(buffer.find(stop), index) for index, stop in enumerate(self._stops)]
        return min((match for match in matches if match[0] >= 0), default=None)

    def _first_open(self, buffer: str) -> tuple[int, int] | None:
        """(position, index) of the earliest unfinished stop string at the end of ``buffer``."""
        starts = [(_open_start(buffer, stop), index) for index, stop in enumerate(self._stops)]
        return min((start for start in starts if start[0] < len(buffer)), default=None)


def _open_start(buffer: str, stop: str) -> int:
    """Where the longest proper prefix of ``stop`` that ends ``buffer`` starts; len(buffer) if none."""
    start = buffer.find(stop[0], max(0, len(buffer) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(buffer[start:]):
            return start
        start = buffer.find(stop[0], start + 1)
    return len(buffer)
