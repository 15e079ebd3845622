"""The optimizer's kernels on NumPy arrays: AdamW in place, sums of squares, sums of gradients. Imports no MindSpore.

Their bits do not depend on the number of threads; AdamW's are those of ``model.optimizer.numpy_update``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import KernelError
from research.qwen.kernels.native import NativeLibrary

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Hyper:
    """The numbers of one update. ``factor`` multiplies the gradient first; ``correction1/2`` are 1 - beta^step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    correction1: float
    correction2: float
    factor: float


def adamw_numbers(hyper: Hyper) -> Array:
    """(9,) in the order of csrc/training.h, each rounded to float32 once."""
    return np.array(
        [
            hyper.beta1,
            hyper.beta2,
            1.0 - hyper.beta1,
            1.0 - hyper.beta2,
            hyper.lr / hyper.correction1,
            1.0 / math.sqrt(hyper.correction2),
            hyper.eps,
            1.0 - hyper.lr * hyper.decay,
            hyper.factor,
        ],
        np.float32,
    )


class NativeOptimizer:
    """What ``model.optimizer.AdamW`` and the sums of gradients take in place of NumPy. Arrays: flat, contiguous."""

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library

    def update(self, weight: Array, gradient: Array, first: Array, second: Array, hyper: Hyper) -> None:
        """One AdamW update in place; the gradient is only read."""
        self._run("QwenAdamW", [weight, gradient, first, second], adamw_numbers(hyper))

    def square_sum(self, values: Array) -> float:
        """Sum of squares, infinite or NaN if a number is, or beyond float32."""
        out = np.zeros(1, np.float64)
        self._run("QwenSquareSum", [values], out)
        return float(out[0])

    def add(self, to: Array, values: Array) -> None:
        """``to += values``."""
        self._run("QwenAddInto", [to], values)

    def _run(self, name: str, inputs: list[NDArray[Any]], last: NDArray[Any]) -> None:
        if not all(array.flags.c_contiguous for array in (*inputs, last)):
            raise KernelError(f"{name} takes contiguous arrays only")
        code = self._library.bind(name, inputs, last)()
        if code:
            raise KernelError(
                f"{name} failed with code {code} on shapes {[a.shape for a in (*inputs, last)]}"
            )
