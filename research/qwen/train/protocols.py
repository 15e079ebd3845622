"""What the training loop asks of the model, of the data and of the other processes; it knows nothing else of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

PADDING = -1  # segment of what is no token


class Batch(Protocol):
    """Rows of token ids; every array is (B, S) int32. Padding has segment -1 and label -100."""

    @property
    def ids(self) -> NDArray[np.int32]: ...

    @property
    def labels(self) -> NDArray[np.int32]: ...

    @property
    def positions(self) -> NDArray[np.int32]: ...

    @property
    def segments(self) -> NDArray[np.int32]: ...


class Batches(Protocol):
    """The batches of this process, in an order that depends on nothing but the seed and the epoch's number."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch yields in this process, before they are grouped into optimizer steps."""

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``number`` (from 0), beginning with batch ``start``."""


class StepResult(Protocol):
    """One optimizer step: mean loss and number of the tokens learned from (all processes), norm of the gradients before
    clipping, whether they overflowed (then nothing was changed), and the loss scale (1 if there is none)."""

    @property
    def loss(self) -> float: ...

    @property
    def grad_norm(self) -> float: ...

    @property
    def tokens(self) -> int: ...

    @property
    def overflow(self) -> bool: ...

    @property
    def loss_scale(self) -> float: ...


class TrainStep(Protocol):
    """A model in training, with its optimizer. NumPy in and out."""

    def step(self, micro: Sequence[Batch], lr: float) -> StepResult:
        """One optimizer step over several batches, as if they were one."""

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """Sum of the losses of this process's tokens, and how many tokens; nothing is changed."""

    def state(self) -> Mapping[str, NDArray[Any]]:
        """Everything the next step depends on. Called in every process; that of rank 0 has to be complete."""

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what ``state`` returned; the arrays are read-only and to be copied."""


def _alone(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values


@dataclass(frozen=True)
class Ranks:
    """This process among ``world``. ``total`` gives every process the sum of the arrays (1-D float64) all passed."""

    rank: int = 0
    world: int = 1
    total: Callable[[NDArray[np.float64]], NDArray[np.float64]] = _alone

    def sums(self, *values: float) -> list[float]:
        """Every value summed over the processes; also a point all of them have to reach."""
        own = np.array(values, np.float64)
        return [float(value) for value in (self.total(own) if self.world > 1 else own)]
