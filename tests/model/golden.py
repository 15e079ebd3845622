"""Golden data for the model tests: the small fixtures, or the full data where QWEN_GOLDEN names its folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from tests import fixtures_util

TOLERANCE = 3e-4  # float32, max abs difference of logits, hidden states and cached keys (golden README)
BACKENDS = ("reference", "cpu")
FULL = os.environ.get("QWEN_GOLDEN")  # read at import: tests run without QWEN_ variables


def data_folder(name: str) -> Path:
    """Where the .npz files of a golden model are."""
    if not FULL:
        return fixtures_util.golden_folder(name)
    return Path(FULL) / ("longctx" if name == "longctx" else f"models/{name}")


def weights_folder(name: str) -> Path:
    """Config and weights of a golden model."""
    if not FULL:
        return fixtures_util.model_folder(name)
    return data_folder(name) / "model" if name == "longctx" else data_folder(name)


def load(name: str, file: str = "golden.npz") -> dict[str, Any]:
    """Arrays of one .npz by name."""
    with np.load(data_folder(name) / file) as archive:
        return {key: archive[key] for key in archive.files}


def assert_logits(golden: dict[str, Any], key: str, got: np.ndarray, rows: Any = slice(None)) -> None:
    """Compare logits with ``golden[key]`` (columns ``::vocab_stride``) and the winner of each whole row."""
    stride = int(golden.get("vocab_stride", 1))
    want = golden[key][rows]
    difference = np.abs(got[..., ::stride] - want)
    assert difference.max() <= TOLERANCE, (
        f"{key}: max {difference.max():.2e} mean {difference.mean():.2e} > {TOLERANCE}"
    )
    winners = golden.get(f"{key}_argmax", golden[key].argmax(-1))[rows]
    np.testing.assert_array_equal(got.argmax(-1), winners, err_msg=key)
