"""AdamW with float32 state, in place, as PyTorch computes it. Imports no MindSpore.

The seam for a fused kernel is ``Update``: it reads and writes weight, gradient and both moments of one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from research.qwen.kernels.native_training import Hyper
from research.qwen.model.training_specs import OptimizerSpec

Array = NDArray[np.float32]
BLOCK = 1 << 15  # numbers at a time: the passes over a block stay in the cache

# (weight, gradient, first moment, second moment, hyper): all flat, contiguous float32 of one size, changed in place.
Update = Callable[[Array, Array, Array, Array, Hyper], None]
SquareSum = Callable[[Array], float]  # sum of squares of a flat array


def numpy_update(weight: Array, gradient: Array, first: Array, second: Array, hyper: Hyper) -> None:
    """w *= 1 - lr * decay; m, v: moving averages of g and g^2; w -= lr / c1 * m / (sqrt(v / c2) + eps)."""
    one, two = np.float32(1.0 - hyper.beta1), np.float32(1.0 - hyper.beta2)
    size, root = np.float32(hyper.lr / hyper.correction1), np.float32(1.0 / math.sqrt(hyper.correction2))
    scratch = np.empty(min(BLOCK, weight.size), np.float32)
    for at in range(0, weight.size, BLOCK):
        w, g = weight[at : at + BLOCK], gradient[at : at + BLOCK]
        m, v = first[at : at + BLOCK], second[at : at + BLOCK]
        part = scratch[: w.size]
        if hyper.factor != 1.0:
            g *= np.float32(hyper.factor)
        m *= np.float32(hyper.beta1)
        np.multiply(g, one, out=part)
        m += part
        v *= np.float32(hyper.beta2)
        np.multiply(g, g, out=part)
        part *= two
        v += part
        np.sqrt(v, out=part)
        part *= root
        part += np.float32(hyper.eps)
        np.divide(m, part, out=part)
        part *= size
        if hyper.decay:
            w *= np.float32(1.0 - hyper.lr * hyper.decay)
        w -= part


def numpy_square_sum(values: Array) -> float:
    """Sum of squares, blocks in float32 and their sums in float64."""
    total = 0.0
    for at in range(0, values.size, BLOCK):
        part = values[at : at + BLOCK]
        total += float(np.dot(part, part))
    return total


class AdamW:
    """Moments of every trained parameter and the number of updates done."""

    def __init__(
        self,
        spec: OptimizerSpec,
        parameters: Mapping[str, Array],
        update: Update = numpy_update,
        square_sum: SquareSum = numpy_square_sum,
    ) -> None:
        self.spec, self._parameters = spec, parameters
        self._update, self._square_sum = update, square_sum
        self.first = {name: np.zeros_like(value) for name, value in parameters.items()}
        self.second = {name: np.zeros_like(value) for name, value in parameters.items()}
        self.updates = 0

    def norm(self, gradients: Mapping[str, Array]) -> float:
        """Euclidean norm over all gradients; infinite or NaN if one of them is."""
        return math.sqrt(sum(self._square_sum(value.reshape(-1)) for value in gradients.values()))

    def apply(self, gradients: Mapping[str, Array], lr: float, norm: float, factor: float = 1.0) -> None:
        """One update. ``norm`` is that of the gradients times ``factor``; beyond clip_norm they are shrunk to it.

        The gradients are spoiled.
        """
        spec = self.spec
        self.updates += 1
        if spec.clip_norm is not None:
            factor *= min(1.0, spec.clip_norm / (norm + 1e-6))  # PyTorch's clip_grad_norm_
        for name, gradient in gradients.items():
            hyper = Hyper(
                lr,
                spec.beta1,
                spec.beta2,
                spec.eps,
                spec.weight_decay if spec.decays(name) else 0.0,
                1.0 - spec.beta1**self.updates,
                1.0 - spec.beta2**self.updates,
                factor,
            )
            self._update(
                self._parameters[name].reshape(-1),
                gradient.reshape(-1),
                self.first[name].reshape(-1),
                self.second[name].reshape(-1),
                hyper,
            )
