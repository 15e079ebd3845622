"""What happened at every step so far: for the loss curve, the metrics file and the summary; part of a checkpoint."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research.qwen.errors import CheckpointError


@dataclass(frozen=True)
class Record:
    """One optimizer step. ``loss`` and ``grad_norm`` are NaN for a step that overflowed.

    ``epoch`` counts passes over the data with a fraction; ``tokens`` are those learned from, ``seen`` all that are no
    padding, both of all processes; ``seconds`` is the time of the step alone.
    """

    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: float
    seen: float
    seconds: float
    overflow: bool
    loss_scale: float

    def as_json(self, step: int) -> dict[str, Any]:
        """One line of the metrics file."""
        line: dict[str, Any] = {"step": step, **{key: finite(value) for key, value in asdict(self).items()}}
        line |= {"tokens": int(self.tokens), "seen": int(self.seen)}  # those of a checkpoint are floats
        line["tokens_per_s"] = round(self.seen / self.seconds, 1) if self.seconds > 0 else None
        return line


COLUMNS = tuple(field.name for field in fields(Record))


@dataclass(frozen=True)
class Evaluation:
    """Mean loss per token of the held-out data after a step."""

    step: int
    loss: float

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where a float64 cannot hold it."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    def as_json(self) -> dict[str, Any]:
        """One line of the metrics file."""
        return {"step": self.step, "eval_loss": self.loss, "perplexity": finite(self.perplexity)}


class History:
    """All steps of a run, the first is number 1, and all evaluations."""

    def __init__(self) -> None:
        self._columns = {name: array("d") for name in COLUMNS}
        self.evaluations: list[Evaluation] = []

    def __len__(self) -> int:
        return len(self._columns["loss"])

    def add(self, record: Record) -> None:
        """Append the record of the next step."""
        for name, column in self._columns.items():
            column.append(float(getattr(record, name)))

    def column(self, name: str) -> NDArray[np.float64]:
        """One field of all steps, (steps,) float64."""
        return np.array(self._columns[name], np.float64)

    def records(self) -> Iterator[tuple[int, Record]]:
        """All steps with their numbers."""
        for index in range(len(self)):
            values: dict[str, Any] = {name: column[index] for name, column in self._columns.items()}
            yield index + 1, Record(**{**values, "overflow": bool(values["overflow"])})

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """The columns, for a checkpoint."""
        return {name: self.column(name) for name in COLUMNS}

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]], evaluations: list[list[float]]) -> History:
        """From ``arrays()`` and the pairs (step, loss); CheckpointError if they do not fit together."""
        out = cls()
        if set(arrays) != set(COLUMNS) or len({array_.shape for array_ in arrays.values()}) != 1:
            raise CheckpointError("its history of steps is incomplete")
        for name, values in arrays.items():
            out._columns[name].extend(np.asarray(values, np.float64).tolist())
        out.evaluations = [Evaluation(int(step), float(loss)) for step, loss in evaluations]
        return out


def finite(value: Any) -> Any:
    """The value, or None for a float that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
