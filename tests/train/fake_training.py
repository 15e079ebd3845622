"""A model small enough to train in microseconds: the next label is a sum of two numbers per token id, learned by Adam.

Everything a resume depends on is real: parameters and moments in float32, a step counter, a loss scale, noise that
depends on seed and step alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from research.qwen.train import report
from research.qwen.train.loop import run
from research.qwen.train.options import LoopOptions, Outcome
from research.qwen.train.schedule import Schedule

VOCAB, LENGTH = 16, 8
BETA1, BETA2, EPS = 0.9, 0.95, 1e-8


@dataclass(frozen=True)
class FakeBatch:
    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    positions: NDArray[np.int32]
    segments: NDArray[np.int32]


@dataclass(frozen=True)
class FakeResult:
    loss: float
    grad_norm: float
    tokens: int
    overflow: bool = False
    loss_scale: float = 1.0


class FakeBatches:
    """Batches of two rows of random ids; label = id of the column's weight, so there is something to learn."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.steps_per_epoch, self._seed = count, seed
        self.asked: list[tuple[int, int]] = []

    def epoch(self, number: int, start: int = 0) -> Iterator[FakeBatch]:
        self.asked.append((number, start))
        for index in range(start, self.steps_per_epoch):
            rng = np.random.default_rng([self._seed, number, index])
            ids = rng.integers(0, VOCAB, (2, LENGTH)).astype(np.int32)
            labels = (3 * ids + 1) % VOCAB
            segments = np.zeros((2, LENGTH), np.int32)
            labels[1, 5:], segments[1, 5:] = -100, -1
            yield FakeBatch(ids, labels.astype(np.int32), np.zeros_like(ids), segments)


class FakeStep:
    """See the module. ``losses`` overrides what single steps report, by their number from 1."""

    def __init__(self, losses: Mapping[int, FakeResult] | None = None, frozen: bool = False) -> None:
        self.weight = np.zeros(VOCAB, np.float32)
        self.m, self.v = np.zeros_like(self.weight), np.zeros_like(self.weight)
        self.steps, self.scale = 0, np.float32(1024)
        self.losses, self.frozen = dict(losses or {}), frozen
        self.rates: list[float] = []
        self.sizes: list[int] = []

    def step(self, micro: Sequence[FakeBatch], lr: float) -> FakeResult:
        self.steps += 1
        self.rates.append(lr)
        self.sizes.append(len(micro))
        if self.steps in self.losses:
            return self.losses[self.steps]
        ids = np.concatenate([batch.ids.ravel() for batch in micro])
        labels = np.concatenate([batch.labels.ravel() for batch in micro])
        ids, labels = ids[labels != -100], labels[labels != -100]
        noise = np.random.default_rng([7, self.steps]).normal(0, 0.01, ids.shape).astype(np.float32)
        error = self.weight[ids] + noise - labels / np.float32(VOCAB)
        gradient = np.zeros_like(self.weight)
        np.add.at(gradient, ids, 2 * error / np.float32(len(ids)))
        if not self.frozen:
            self._adam(gradient, np.float32(lr))
        self.scale = np.float32(1024 + self.steps)
        return FakeResult(
            float((error**2).mean()), float(np.linalg.norm(gradient)), len(ids), False, float(self.scale)
        )

    def _adam(self, gradient: NDArray[np.float32], lr: np.float32) -> None:
        self.m = np.float32(BETA1) * self.m + np.float32(1 - BETA1) * gradient
        self.v = np.float32(BETA2) * self.v + np.float32(1 - BETA2) * gradient**2
        m = self.m / np.float32(1 - BETA1**self.steps)
        v = self.v / np.float32(1 - BETA2**self.steps)
        self.weight = self.weight - lr * m / (np.sqrt(v) + np.float32(EPS))

    def evaluate(self, batch: FakeBatch) -> tuple[float, int]:
        known = batch.labels != -100
        error = self.weight[batch.ids[known]] - batch.labels[known] / np.float32(VOCAB)
        return float((error**2).sum()), int(known.sum())

    def state(self) -> dict[str, NDArray[Any]]:
        return {
            "weight": self.weight,
            "adam_m.weight": self.m,
            "adam_v.weight": self.v,
            "step": np.array(self.steps, np.int64),
            "loss_scale": np.array(self.scale),
        }

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        assert set(state) == set(self.state())
        names = ("weight", "adam_m.weight", "adam_v.weight")
        self.weight, self.m, self.v = (np.array(state[name]) for name in names)
        self.steps, self.scale = int(state["step"]), np.float32(state["loss_scale"])

    def save_model(self, folder: Path) -> None:
        """The caller's hook: a usable model in the checkpoint's folder."""
        (folder / "adapter_model.safetensors").write_bytes(self.weight.tobytes())


class Quiet:
    """StopSignals without signals and without their thread."""

    name: str | None = None
    tell: Any = None

    def restore(self) -> None:
        pass


def options(**changes: Any) -> LoopOptions:
    """Twelve steps of one batch with every rate different."""
    return LoopOptions(
        **{"schedule": Schedule(0.05, warmup_steps=3), "max_steps": 12, "save_every": 4, **changes}
    )


def train(
    output: Path, step: FakeStep | None = None, batches: FakeBatches | None = None, **more: Any
) -> Outcome:
    """A run with the fakes; ``more`` goes to the options where it is one of them, else to ``run``."""
    fields = LoopOptions.__dataclass_fields__
    chosen = options(**{name: more.pop(name) for name in list(more) if name in fields})
    step = step or FakeStep()
    more.setdefault("stop", Quiet())
    # A picture takes half a second, and having a file on the disk some milliseconds.
    picture, disk = (mock.patch.object(report, "draw", lambda *_: None), mock.patch("os.fsync"))
    with picture, disk:
        return run(step, batches or FakeBatches(5), chosen, output, save_model=step.save_model, **more)


def curve(outcome: Outcome) -> list[tuple[float, ...]]:
    """What has to be the same bit by bit: loss, rate, norm, scale and epoch of every step, and all evaluations."""
    names = ("loss", "lr", "grad_norm", "loss_scale", "epoch", "tokens")
    steps = zip(*(outcome.history.column(name).tolist() for name in names), strict=True)
    return [*steps, *((float(one.step), one.loss) for one in outcome.history.evaluations)]
