"""Settings of the training loop, where a run is, and how it ended."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.qwen.errors import ConfigError
from research.qwen.train.history import History
from research.qwen.train.schedule import Schedule

# Settings of the loop that a resumed run may change.
FREE = frozenset(
    f"loop.{name}" for name in "epochs max_steps log_every save_every keep_last patience tensorboard".split()
)


@dataclass(frozen=True)
class LoopOptions:
    """How long to train, and what to do meanwhile.

    Args:
        schedule: the learning rate.
        epochs: passes over the data; may be a fraction.
        max_steps: optimizer steps; overrides ``epochs``.
        accumulate: batches in one optimizer step. The last step of an epoch takes what is left.
        eval_every, save_every: in steps; None: after every epoch. Both also happen at the end.
        log_every: steps a line where there is no terminal.
        keep_last: checkpoints to keep, besides the best.
        patience: evaluations without a gain of ``min_delta`` after which training ends; None: never.
        overflow_limit: overflowing steps in a row at the least loss scale (``least_scale``) that end the run.
        tensorboard: write events, too.

    Raises:
        ConfigError: a value that makes no sense.
    """

    schedule: Schedule
    epochs: float = 1.0
    max_steps: int | None = None
    accumulate: int = 1
    eval_every: int | None = None
    save_every: int | None = None
    log_every: int = 10
    keep_last: int = 2
    patience: int | None = None
    min_delta: float = 0.0
    overflow_limit: int = 10
    least_scale: float = 1.0
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for (
            name
        ) in "max_steps accumulate eval_every save_every log_every keep_last patience overflow_limit".split():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise ConfigError(f"epochs must be above 0, got {self.epochs}")
        if not self.min_delta >= 0:
            raise ConfigError(f"min_delta must be at least 0, got {self.min_delta}")


@dataclass
class LoopState:
    """Where a run is. ``micro`` counts batches of this process within ``epoch`` (from 0)."""

    step: int = 0
    epoch: int = 0
    micro: int = 0
    skipped: int = 0
    stuck: int = 0  # overflows in a row at the least loss scale
    best_loss: float | None = None
    best_step: int | None = None
    bad_evaluations: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``reason`` is finished, early stop, SIGTERM or SIGINT; the summary is that of summary.json."""

    reason: str
    step: int
    latest: Path | None
    best: Path | None
    history: History
    summary: dict[str, Any]

    @property
    def exit_code(self) -> int:
        """0, also after SIGTERM, as all is saved then; 130 after Ctrl-C."""
        return 130 if self.reason == "SIGINT" else 0
