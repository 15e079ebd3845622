"""One process of the distributed test: ``distributed_worker.py FOLDER`` under msrun, or alone with all rows.

Writes losses, norms, token counts and the trained weights of a few steps of full and LoRA training to
FOLDER/rank<rank>of<world>.npz.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from research.qwen.model.open_training import open_training
from research.qwen.model.parallel import World, join_world
from research.qwen.model.train_step import TrainStep
from research.qwen.model.training_specs import MethodSpec, OptimizerSpec
from tests.train.fake_training import FakeBatch

DEMO = Path(__file__).parents[2] / "research" / "qwen" / "demo" / "model"
METHODS = {
    "full": MethodSpec(),
    "lora": MethodSpec("lora", rank=4, dropout=0.0, targets=("all",), modules_to_save=("wte",)),
}
STEPS, ROWS, LENGTH = 3, 4, 24


def rows(step: int, micro: int, vocabulary: int) -> FakeBatch:
    """Four rows of very different lengths, so that half of them has far more tokens than the other."""
    rng = np.random.default_rng([step, micro])
    ids = rng.integers(0, vocabulary, (ROWS, LENGTH)).astype(np.int32)
    labels, segments = ids.copy(), np.zeros_like(ids)
    for row, length in enumerate((24, 19, 5, 3)):
        labels[row, :2] = labels[row, length:] = -100
        segments[row, length:] = -1
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    return FakeBatch(ids, labels, positions, segments)


def share(batch: FakeBatch, rank: int, world: int) -> FakeBatch:
    """The rows of one process."""
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    return FakeBatch(batch.ids[mine], batch.labels[mine], batch.positions[mine], batch.segments[mine])


def train(world: World, method: MethodSpec) -> dict[str, np.ndarray]:
    """Three steps of two micro batches each, from the demo model."""
    optimizer = OptimizerSpec(clip_norm=1.0)
    step = open_training(DEMO, method=method, optimizer=optimizer, seed=7, exchange=world)
    vocabulary = step.config.vocab_size
    results = []
    for number in range(STEPS):
        micro = [share(rows(number, i, vocabulary), world.rank, world.world) for i in range(2)]
        result = step.step(micro, lr=1e-3)
        results.append((result.loss, result.grad_norm, result.tokens, result.overflow))
    out = {f"weight:{name}": value.copy() for name, value in step.trainable().items()}
    return {**out, "results": np.array(results, np.float64), "overflow": overflow(world, step)}


def overflow(world: World, step: TrainStep) -> np.ndarray:
    """Whether a step is thrown away here when the last process alone has a gradient that is not finite."""
    before = {name: value.copy() for name, value in step.trainable().items()}
    accumulate = step.model.accumulate

    def broken(rows, scale, sums, *rest):
        loss = accumulate(rows, scale, sums, *rest)
        if world.rank == world.world - 1:
            next(iter(sums.arrays.values())).reshape(-1)[0] = np.inf
        return loss

    step.model.accumulate = broken
    result = step.step([share(rows(9, 0, step.config.vocab_size), world.rank, world.world)], lr=1e-3)
    same = all(np.array_equal(before[name], value) for name, value in step.trainable().items())
    return np.array([result.overflow, same])


def main(folder: Path) -> None:
    """See the module."""
    world = join_world()
    found = {}
    for name, method in METHODS.items():
        found |= {f"{name}/{key}": value for key, value in train(world, method).items()}
    exact = world.total(
        np.array([np.pi * 10.0 ** (9 * world.rank), 1 + 1e-15, np.inf if world.rank else 0.0])
    )
    found["total"] = exact
    np.savez(folder / f"rank{world.rank}of{world.world}.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
