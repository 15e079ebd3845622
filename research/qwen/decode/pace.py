"""How many prompt tokens a step may read while others decode, from how long steps took: text never depends on it."""

from __future__ import annotations

SMALLEST, LARGEST = 8, 256
_WEIGHT = 0.3  # of the newest measurement


class Pace:
    """Keeps steps that also read a prompt within ``stretch`` times a step that only decodes.

    The cost of a prompt token is what such a step took beyond one that decodes as many sequences, divided by the
    tokens; the budget spends ``stretch`` - 1 plain steps on them, between 8 and 256 tokens.
    """

    def __init__(self, stretch: float, start: int = 16):
        self.stretch, self.budget = stretch, start
        self._plain: dict[int, float] = {}  # sequences that decode -> seconds of a plain step
        self._token: float | None = None

    def note(self, decoding: int, reading: int, seconds: float) -> int:
        """A step computed ``decoding`` single tokens and ``reading`` of prompts; the budget of the next one."""
        if not decoding:
            return self.budget
        if not reading:
            self._plain[decoding] = _mixed(self._plain.get(decoding), seconds)
        plain = self._expected(decoding)
        if reading and plain is not None:
            self._token = _mixed(self._token, max(seconds - plain, 0.0) / reading)
        if plain is not None and self._token is not None:
            wanted = (self.stretch - 1) * plain / max(self._token, 1e-9)
            self.budget = int(min(max(wanted, SMALLEST), LARGEST))
        return self.budget

    def _expected(self, decoding: int) -> float | None:
        """Seconds of a plain step; of the nearest number of sequences that was seen, rather fewer than more."""
        if not self._plain:
            return None
        nearest = min(self._plain, key=lambda seen: (abs(seen - decoding), seen))
        return self._plain[nearest]


def _mixed(known: float | None, newest: float) -> float:
    return newest if known is None else (1 - _WEIGHT) * known + _WEIGHT * newest
