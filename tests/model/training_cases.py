"""Batches and golden data for the tests of training.

Golden arrays are the reduced ones of scripts/make_train_fixtures.py, or the full ones of the folder that
QWEN_GOLDEN names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scripts.make_train_fixtures import reduced
from tests import fixtures_util
from tests.model.golden import FULL

BACKENDS = ("reference", "cpu")


@dataclass(frozen=True)
class Rows:
    """A batch: arrays (B, S) int32."""

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    segments: np.ndarray


def batch(ids: np.ndarray, labels: np.ndarray, mask: np.ndarray) -> Rows:
    """Unpacked rows; ``mask`` is 0 at padding."""
    positions = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
    arrays = (ids, labels, positions, np.where(mask > 0, 0, -1))
    return Rows(*(np.ascontiguousarray(array, np.int32) for array in arrays))


def rows_of(texts: Sequence[Sequence[int]], width: int | None = None, pad: int = 0) -> Rows:
    """One text a row, all tokens learned from, padded on the right."""
    return packed([[text] for text in texts], width, pad)


def packed(rows: Sequence[Sequence[Sequence[int]]], width: int | None = None, pad: int = 0) -> Rows:
    """Several texts a row, one behind the other; the first label of each is ignored."""
    width = width or max(sum(map(len, row)) for row in rows)
    ids, labels = np.full((len(rows), width), pad), np.full((len(rows), width), -100)
    positions, segments = np.zeros((len(rows), width)), np.full((len(rows), width), -1)
    for r, row in enumerate(rows):
        at = 0
        for number, text in enumerate(row):
            place = slice(at, at + len(text))
            ids[r, place], positions[r, place], segments[r, place] = text, range(len(text)), number
            labels[r, at + 1 : at + len(text)] = text[1:]
            at += len(text)
    return Rows(*(np.ascontiguousarray(array, np.int32) for array in (ids, labels, positions, segments)))


def texts(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random texts."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, length).tolist() for length in lengths]


def model_folder() -> Path:
    """The golden model that is trained."""
    return Path(FULL) / "finetune" / "model" if FULL else fixtures_util.model_folder("finetune")


def golden() -> dict[str, Any]:
    """Arrays of training.npz."""
    if FULL:
        return reduced(Path(FULL) / "finetune")
    with np.load(fixtures_util.FIXTURES / "finetune" / "training.npz") as stored:
        return {name: stored[name] for name in stored.files}


def golden_batch(found: Mapping[str, Any]) -> Rows:
    """The batch the golden losses are of."""
    return batch(found["input_ids"], found["labels"], found["attention_mask"])


def relative(got: np.ndarray, want: np.ndarray) -> float:
    """Norm of the difference by the norm of what is wanted."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
