"""How many prompt tokens a step may read while others decode, from how long steps took: text never depends on it."""

from __future__ import annotations

from collections import deque
from statistics import median

SMALLEST, LARGEST = 8, 256
ROWS = 16  # kernels compute rows in groups of as many: a group that is not full costs nearly what a full one does
REST = 8  # reading steps between two that only decode
_GROWTH = 1.5  # of the budget, from one step to the next
_PLAIN_STEPS, _READING_STEPS = 5, 5  # kept: the median of so many does not heed one that was disturbed


class Pace:
    """Keeps steps that also read a prompt within ``stretch`` times a step that only decodes.

    The cost of a prompt token is what such a step took beyond one that decodes as many sequences, divided by the
    tokens; the budget spends ``stretch`` - 1 plain steps on them, between 8 and 256 tokens, in whole groups of rows.
    A few tokens may cost next to nothing and more of them much, and what lies in the cache before them counts, too: so
    a prompt that comes after plain steps begins with ``start`` tokens, and the budget grows slowly. Every ninth step
    reads nothing: when something else begins to use the machine all steps get longer, and a stale idea of a plain
    step would let a prompt crawl.
    """

    def __init__(self, stretch: float, start: int = 16):
        self.stretch, self.start, self.budget = stretch, start, start
        self._plain: dict[int, deque[float]] = {}  # sequences that decode -> seconds of plain steps
        self._token: deque[float] = deque(maxlen=_READING_STEPS)
        self._read_steps, self._resting = 0, False

    def note(self, decoding: int, reading: int, seconds: float) -> int:
        """A step computed ``decoding`` single tokens and ``reading`` of prompts; the budget of the next one, or 0."""
        if decoding and reading:
            self._read(decoding, reading, seconds)
            self._read_steps += 1
            self._resting = self._read_steps % REST == 0
        elif decoding:
            self._plain.setdefault(decoding, deque(maxlen=_PLAIN_STEPS)).append(seconds)
            if not self._resting:
                self._token.clear()
                self._read_steps = 0
                self.budget = _whole_groups(decoding, self.start)
            self._resting = False
        return 0 if self._resting else self.budget

    def _read(self, decoding: int, reading: int, seconds: float) -> None:
        plain = self._expected(decoding)
        if plain is None:
            return
        self._token.append(max(seconds - plain, 0.0) / reading)
        wanted = (self.stretch - 1) * plain / max(median(self._token), 1e-9)
        most = max(_GROWTH * self.budget, self.budget + ROWS)
        self.budget = _whole_groups(decoding, int(min(max(wanted, SMALLEST), LARGEST, most)))

    def _expected(self, decoding: int) -> float | None:
        """Seconds of a plain step; of the nearest number of sequences that was seen, rather fewer than more."""
        if not self._plain:
            return None
        nearest = min(self._plain, key=lambda seen: (abs(seen - decoding), seen))
        return median(self._plain[nearest])


def _whole_groups(decoding: int, tokens: int) -> int:
    """At most ``tokens``, so that all rows of the step fill whole groups, where that leaves enough of them."""
    fitting = (decoding + tokens) // ROWS * ROWS - decoding
    return fitting if fitting >= SMALLEST else tokens
