"""How many prompt tokens a step may read while others decode, from how long steps took: text never depends on it."""

from __future__ import annotations

from collections import deque
from statistics import median

SMALLEST, LARGEST = 8, 256
ROWS = 16  # kernels compute rows in groups of as many: a group that is not full costs nearly what a full one does
REST = 8  # reading steps between two that only decode
_GROWTH = 1.5  # of the budget, from one step to the next
# Of the cost of the smallest budget, where it is too dear anyway and little of that is for its tokens.
_DEARER = 1.25
_FURTHEST, _SURE = 2.75, 3  # plain steps that a step may take by the last steps alone, and how many these are
_PLAIN_STEPS, _READING_STEPS = 5, 12  # kept; medians of them do not heed one that was disturbed


class Pace:
    """Keeps steps that also read a prompt within ``stretch`` times a step that only decodes.

    What such a step takes beyond one that decodes as many sequences is taken for a line over its prompt tokens: a part
    for reading at all, and a part for each token. The budget spends ``stretch`` - 1 plain steps on it, between 8 and
    256 tokens, in whole groups of rows. Where even the smallest budget takes longer, because reading at all does, it is
    as many tokens as cost hardly more.

    - Every ninth step reads nothing: when something else begins to use the machine all steps get longer, and a stale
      idea of a plain step would let a prompt crawl. The step after it reads half of the budget, so that the line has
      two points.
    - What lies in the cache before a prompt counts, too: so a prompt that comes after plain steps begins with ``start``
      tokens, and the budget grows slowly.
    """

    def __init__(self, stretch: float, start: int = 16):
        self.stretch, self.start, self.budget = stretch, start, start
        self._plain: dict[int, deque[float]] = {}  # sequences that decode -> seconds of plain steps
        # Tokens, and seconds beyond a plain step.
        self._read: deque[tuple[int, float]] = deque(maxlen=_READING_STEPS)
        self._steps, self._resting = 0, False

    def note(self, decoding: int, reading: int, seconds: float) -> int:
        """A step computed ``decoding`` single tokens and ``reading`` of prompts; the budget of the next one, or 0."""
        probe = False
        if decoding and reading:
            self._take(decoding, reading, seconds)
            self._steps += 1
            self._resting = self._steps % REST == 0
        elif decoding:
            self._plain.setdefault(decoding, deque(maxlen=_PLAIN_STEPS)).append(seconds)
            probe = self._resting
            if not self._resting:
                self._read.clear()
                self._steps = 0
                self.budget = _whole_groups(decoding, self.start)
            self._resting = False
        if self._resting:
            return 0
        return _whole_groups(decoding, self.budget // 2) if probe else self.budget

    def _take(self, decoding: int, reading: int, seconds: float) -> None:
        plain = self._expected(decoding)
        if plain is None:
            return
        self._read.append((reading, max(seconds - plain, 0.0)))
        most = max(_GROWTH * self.budget, self.budget + ROWS)
        wanted = _tokens_for((self.stretch - 1) * plain, list(self._read))
        # The line may be wrong by what disturbs a machine: never more than would do if there were no costly beginning.
        dear = median(spent / tokens for tokens, spent in list(self._read)[-_SURE:])
        sure = (_FURTHEST - 1) * plain / max(dear, 1e-9)
        self.budget = _whole_groups(decoding, int(min(max(min(wanted, sure), SMALLEST), LARGEST, most)))

    def _expected(self, decoding: int) -> float | None:
        """Seconds of a plain step; of the nearest number of sequences that was seen, rather fewer than more."""
        if not self._plain:
            return None
        nearest = min(self._plain, key=lambda seen: (abs(seen - decoding), seen))
        return median(self._plain[nearest])


def _tokens_for(seconds: float, steps: list[tuple[int, float]]) -> float:
    """Tokens that can be read in so many seconds, by the line through the shorter and the longer of some steps."""
    middle = (min(steps)[0] + max(steps)[0]) / 2
    few = [step for step in steps if step[0] <= middle]
    many = [step for step in steps if step[0] > middle]
    tokens, spent = _middle(few)
    slope = spent / tokens
    if many:
        more_tokens, more_spent = _middle(many)
        slope = max((more_spent - spent) / (more_tokens - tokens), 0.0)
    least = spent - slope * (tokens - SMALLEST)
    if least > seconds and slope * SMALLEST < least / 2:
        seconds = max(seconds, _DEARER * least)
    return tokens + (seconds - spent) / max(slope, 1e-9)


def _middle(steps: list[tuple[int, float]]) -> tuple[float, float]:
    return median(tokens for tokens, _ in steps), median(spent for _, spent in steps)


def _whole_groups(decoding: int, tokens: int) -> int:
    """At most ``tokens``, so that all rows of the step fill whole groups, where that leaves most of them."""
    fitting = (decoding + tokens) // ROWS * ROWS - decoding
    return fitting if fitting >= max(SMALLEST, 0.75 * tokens) else tokens
