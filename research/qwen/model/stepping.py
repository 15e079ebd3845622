"""What the optimizer steps of all backends share: result, other processes, loss scale. Imports no MindSpore."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from research.qwen.model.training_specs import OptimizerSpec

Array = NDArray[np.float32]
FIRST, SECOND = "adam_m.", "adam_v."  # what names of AdamW's moments begin with
LARGEST_SCALE, DEFAULT_SCALE = 2.0**24, 2.0**16


@dataclass(frozen=True)
class StepResult:
    """``loss``: mean over all ``tokens`` learned from; ``grad_norm``: before clipping; ``overflow``: a gradient was not
    finite, nothing was changed and the loss scale was halved (there is one with float16 only; else it is 1)."""

    loss: float
    grad_norm: float
    tokens: int
    overflow: bool
    loss_scale: float


class Exchange(Protocol):
    """Other processes that train the same model on other rows."""

    rank: int
    world: int

    def sums(self, *values: float) -> list[float]:
        """Each value summed over the processes."""

    def add(self, gradients: Mapping[str, Array]) -> None:
        """Replaces every gradient by the sum of those of all processes, in place; the names and order are the same."""


class Alone:
    """No other process."""

    rank, world = 0, 1

    def sums(self, *values: float) -> list[float]:
        """The values."""
        return list(values)

    def add(self, gradients: Mapping[str, Array]) -> None:
        """Nothing to add."""


class LossScale:
    """Dynamic loss scale (https://arxiv.org/abs/1710.03740): halved on overflow, doubled after ``window`` good
    steps."""

    def __init__(self, start: float | None, window: int) -> None:
        self.value, self.good = start or 1.0, 0
        self._active, self._window = start is not None, window

    def after(self, overflow: bool) -> None:
        """Take note of a step."""
        if not self._active:
            return
        self.good = 0 if overflow else self.good + 1
        if overflow:
            self.value = max(self.value / 2.0, 1.0)
        elif self.good >= self._window:
            self.value, self.good = min(self.value * 2.0, LARGEST_SCALE), 0


def loss_scale(optimizer: OptimizerSpec, compute_dtype: str) -> LossScale:
    """The loss scale of a run: there is one if it is asked for, or if the computation is float16."""
    start = optimizer.loss_scale or (DEFAULT_SCALE if compute_dtype == "float16" else None)
    return LossScale(start, optimizer.loss_scale_window)
