"""When training has to end because it leads nowhere, and what a user is told then."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from research.qwen.errors import TrainingError
from research.qwen.train.history import Evaluation, Record
from research.qwen.train.protocols import StepResult

Newest = Callable[[], Path | None]  # finds the last good checkpoint


def check_result(result: StepResult, step: int, lr: float, place: str, newest: Newest) -> None:
    """TrainingError if loss or gradients are no numbers, but for an overflow, which was skipped.

    ``step`` counts from 1; ``place`` says which data it read.
    """
    if result.overflow or (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        return
    good = math.isfinite(result.loss)
    value = f"the gradient norm is {result.grad_norm}" if good else f"the loss is {result.loss}"
    none = "; not one token of this step is learned from" if result.tokens == 0 else ""
    raise TrainingError(
        f"training has diverged at step {step} (learning rate {lr:.3g}): {value}{none}. {last_good(newest)}. Start "
        "again with a lower learning rate or a longer warm-up, bf16 instead of fp16, and look at the data around "
        f"{place}"
    )


def check_overflow(record: Record, step: int, stuck: int, limit: int, newest: Newest) -> None:
    """TrainingError after ``limit`` overflows in a row at the least loss scale."""
    if stuck >= limit:
        raise TrainingError(
            f"the gradients overflow at step {step} (learning rate {record.lr:.3g}), {stuck} times in a row although "
            f"the loss scale is down to {record.loss_scale:g}. {last_good(newest)}. Use bf16 instead of fp16, or a "
            "lower learning rate, and look at the data"
        )


def check_evaluation(found: Evaluation, newest: Newest) -> None:
    """TrainingError if the loss of the held-out data is no number."""
    if not math.isfinite(found.loss):
        raise TrainingError(
            f"training has diverged: the evaluation loss is {found.loss} after step {found.step}. {last_good(newest)}. "
            "Start again with a lower learning rate, or bf16 instead of fp16"
        )


def last_good(newest: Newest) -> str:
    """Where a user finds what is left."""
    folder = newest()
    return f"The last good checkpoint is {folder}" if folder else "There is no checkpoint yet"
