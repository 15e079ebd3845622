"""How many prompt tokens a step may read while others decode, from how long steps took: text never depends on it."""

from __future__ import annotations

from collections import deque
from statistics import median

SMALLEST, LARGEST = 8, 256
_GROWTH = 1.5  # of the budget, from one step to the next
_PLAIN_STEPS, _READING_STEPS = 9, 5  # kept: the median of so many does not heed one that was disturbed


class Pace:
    """Keeps steps that also read a prompt within ``stretch`` times a step that only decodes.

    The cost of a prompt token is what such a step took beyond one that decodes as many sequences, divided by the
    tokens; the budget spends ``stretch`` - 1 plain steps on them, between 8 and 256 tokens. A few tokens may cost next
    to nothing and more of them much, and what lies in the cache before them counts, too: so a prompt that comes after
    plain steps begins with ``start`` tokens, and the budget grows by no more than half from step to step.
    """

    def __init__(self, stretch: float, start: int = 16):
        self.stretch, self.start, self.budget = stretch, start, start
        self._plain: dict[int, deque[float]] = {}  # sequences that decode -> seconds of plain steps
        self._token: deque[float] = deque(maxlen=_READING_STEPS)

    def note(self, decoding: int, reading: int, seconds: float) -> int:
        """A step computed ``decoding`` single tokens and ``reading`` of prompts; the budget of the next one."""
        if decoding and reading:
            self._read(decoding, reading, seconds)
        elif decoding:
            self._plain.setdefault(decoding, deque(maxlen=_PLAIN_STEPS)).append(seconds)
            self._token.clear()
            self.budget = self.start
        return self.budget

    def _read(self, decoding: int, reading: int, seconds: float) -> None:
        plain = self._expected(decoding)
        if plain is None:
            return
        self._token.append(max(seconds - plain, 0.0) / reading)
        wanted = (self.stretch - 1) * plain / max(median(self._token), 1e-9)
        self.budget = int(min(max(wanted, SMALLEST), LARGEST, _GROWTH * self.budget))

    def _expected(self, decoding: int) -> float | None:
        """Seconds of a plain step; of the nearest number of sequences that was seen, rather fewer than more."""
        if not self._plain:
            return None
        nearest = min(self._plain, key=lambda seen: (abs(seen - decoding), seen))
        return median(self._plain[nearest])
