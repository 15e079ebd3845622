"""How many prompt tokens a step may read while others decode, from how long steps took: text never depends on it."""

from __future__ import annotations

from collections import deque
from statistics import median

STRETCH = 1.75  # by default
SMALLEST, LARGEST = 4, 256
ROWS = 16  # kernels compute rows in groups of as many: a group that is not full costs nearly what a full one does
REST = 8  # reading steps between two that only decode
_GROWTH = 1.5  # of the budget, from one step to the next
_TOKENS_SHARE = 0.25  # of what reading at all costs, at least for the tokens
# Steps that are looked at: medians of them do not heed one that was disturbed.
_LAST, _PLAIN_STEPS, _READING_STEPS = 3, 5, 12


class Pace:
    """Keeps steps that also read a prompt within ``stretch`` times a step that only decodes.

    A step that reads takes longer for two reasons: what lies in the cache before the prompt is read, however few tokens
    look at it, and the tokens are computed. The budget is between 4 and 256 tokens, in whole groups of rows where that
    leaves most of them. After each step it is multiplied by what was allowed / what was spent. That undershoots where a
    part of the time is not for tokens, so it comes nearer step by step and does not swing.

    - Where reading at all takes most of what is allowed, tokens still get a quarter as much: else a long prompt would
      crawl, and no step be much shorter. How much that is says a line through steps of different length.
    - Every ninth step reads nothing: when something else begins to use the machine, or the answers get long, all steps
      get longer, and a stale idea of a plain step would let a prompt crawl. The step after it reads another number of
      tokens, so that there is a line.
      Between two of them the budget grows by half at most, as a machine that gets faster makes tokens look free.
    - What lies in the cache before a prompt counts, too: so a prompt that comes after plain steps begins with ``start``
      tokens, and the budget grows slowly.
    """

    def __init__(self, stretch: float, start: int = 16):
        self.stretch, self.start, self.budget = stretch, start, start
        self._plain: dict[int, deque[float]] = {}  # sequences that decode -> seconds of plain steps
        # Tokens, and seconds beyond a plain step.
        self._read: deque[tuple[int, float]] = deque(maxlen=_READING_STEPS)
        self._steps, self._resting = 0, False
        self._limit = float(LARGEST)  # until the next plain step

    def note(self, decoding: int, reading: int, seconds: float) -> int:
        """A step computed ``decoding`` single tokens and ``reading`` of prompts; the budget of the next one, or 0."""
        if decoding and reading:
            self._take(decoding, reading, seconds)
            self._steps += 1
            self._resting = self._steps % REST == 0
        elif decoding:
            self._plain.setdefault(decoding, deque(maxlen=_PLAIN_STEPS)).append(seconds)
            if self._resting:
                self._resting = False
                self._limit = _GROWTH * self.budget
                return self._other(decoding)
            self._limit, self._steps = LARGEST, 0
            self._read.clear()
            self.budget = _whole_groups(decoding, self.start)
        return 0 if self._resting else self.budget

    def _other(self, decoding: int) -> int:
        """Another number of tokens, for the second point of a line; rather fewer than more."""
        if self.budget >= _GROWTH * SMALLEST:
            return _whole_groups(decoding, max(self.budget // 2, SMALLEST))
        return int(_GROWTH * self.budget)

    def _take(self, decoding: int, reading: int, seconds: float) -> None:
        plain = self._expected(decoding)
        if plain is None:
            return
        self._read.append((reading, max(seconds - plain, 0.0)))
        steps = list(self._read)
        allowed = max((self.stretch - 1) * plain, (1 + _TOKENS_SHARE) * _beginning(steps))
        # As if all were the tokens' cost: that comes nearer with every step, and never goes beyond.
        token = median(spent / tokens for tokens, spent in steps[-_LAST:])
        wanted = min(allowed / max(token, 1e-9), _GROWTH * self.budget, self._limit, LARGEST)
        self.budget = _whole_groups(decoding, int(max(wanted, SMALLEST)))

    def _expected(self, decoding: int) -> float | None:
        """Seconds of a plain step; of the nearest number of sequences that was seen, rather fewer than more."""
        if not self._plain:
            return None
        nearest = min(self._plain, key=lambda seen: (abs(seen - decoding), seen))
        steps = self._plain[nearest]
        return min(median(steps), steps[-1])  # nothing makes a step too short: a short one is news


def _beginning(steps: list[tuple[int, float]]) -> float:
    """Seconds of reading at all, by the line through the shorter and the longer of some steps; 0 if it is not known."""
    middle = (min(steps)[0] + max(steps)[0]) / 2
    many = [step for step in steps if step[0] > middle]
    if not many:
        return 0.0
    tokens, spent = _middle([step for step in steps if step[0] <= middle])
    more_tokens, more_spent = _middle(many)
    token = max((more_spent - spent) / (more_tokens - tokens), 0.0)
    # No step took less, whatever disturbed the others.
    return min(max(spent - token * tokens, 0.0), min(seconds for _, seconds in steps))


def _middle(steps: list[tuple[int, float]]) -> tuple[float, float]:
    return median(tokens for tokens, _ in steps), median(spent for _, spent in steps)


def _whole_groups(decoding: int, tokens: int) -> int:
    """At most ``tokens``, so that all rows of the step fill whole groups, where that leaves most of them."""
    fitting = (decoding + tokens) // ROWS * ROWS - decoding
    return fitting if fitting >= max(SMALLEST, 0.75 * tokens) else tokens
