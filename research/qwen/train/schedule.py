"""Learning rates: warm-up, then constant, linear or cosine, value by value as in transformers' schedulers.

With w steps of warm-up and n in all, step k (from 0) has the rate ``lr * f(k)``::

    k <  w           f = k / w                     (the first step of a warm-up has rate 0)
    constant         f = 1
    linear           f = (n - k) / (n - w), not below 0
    cosine           f = (1 + cos(pi * p)) / 2 with p = (k - w) / (n - w), not below 0

These are get_constant_schedule_with_warmup, get_linear_schedule_with_warmup and get_cosine_schedule_with_warmup. A
``min_ratio`` m > 0 makes it ``m + (1 - m) * f`` after the warm-up: for cosine as
get_cosine_with_min_lr_schedule_with_warmup does, for linear by the same rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from research.qwen.errors import ConfigError

KINDS = ("cosine", "linear", "constant")
FULL_LR, LORA_LR, WARMUP_RATIO = 1e-5, 3e-4, 0.01  # of the published recipes


@dataclass(frozen=True)
class Schedule:
    """Which curve the learning rate follows.

    Args:
        lr: the highest rate, reached after the warm-up.
        kind: ``cosine``, ``linear`` or ``constant``.
        warmup_ratio: share of all steps that warm up, rounded up to whole steps.
        warmup_steps: that number itself; overrides the ratio.
        min_ratio: the lowest rate as a share of ``lr``.

    Raises:
        ConfigError: a value that makes no sense.
    """

    lr: float = FULL_LR
    kind: str = "cosine"
    warmup_ratio: float = WARMUP_RATIO
    warmup_steps: int | None = None
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"learning rate schedule {self.kind!r} is unknown; known: {', '.join(KINDS)}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ConfigError(f"learning rate must be above 0, got {self.lr}")
        if not 0 <= self.warmup_ratio <= 1:
            raise ConfigError(f"warmup_ratio must be from 0 to 1, got {self.warmup_ratio}")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps must be at least 0, got {self.warmup_steps}")
        if not 0 <= self.min_ratio <= 1:
            raise ConfigError(f"min_ratio must be from 0 to 1, got {self.min_ratio}")
        if self.min_ratio and self.kind == "constant":
            raise ConfigError("min_ratio has no meaning with a constant learning rate; leave it out")

    def warmup(self, total: int) -> int:
        """Steps of warm-up out of ``total``."""
        return math.ceil(total * self.warmup_ratio) if self.warmup_steps is None else self.warmup_steps

    def at(self, step: int, total: int) -> float:
        """Learning rate of step ``step`` (the first is 0) of ``total``."""
        warmup = self.warmup(total)
        if step < warmup:
            return self.lr * (step / max(1, warmup))
        factor = self._after(step - warmup, max(1, total - warmup))
        if self.min_ratio:
            factor = factor * (1 - self.min_ratio) + self.min_ratio
        return self.lr * factor

    def _after(self, done: int, steps: int) -> float:
        if self.kind == "constant":
            return 1.0
        if self.kind == "linear":
            return max(0.0, (steps - done) / steps)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (done / steps))))
