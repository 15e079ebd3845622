"""Make the small fixtures of training steps from the full golden data.

    python scripts/make_train_fixtures.py --golden DIR [--out tests/fixtures]

finetune/training.npz: the batch, losses and norms as they are; every 8th column of the logits (``vocab_stride``); of
each gradient its norm (``norm__NAME``) and about 400 numbers, every n-th of the flattened array (``grad__NAME`` with
``stride__NAME``); the parameters after five steps that the golden data holds (``adamw__NAME``, ``trainer__NAME``).
The model itself is packed by make_finetune_fixtures.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

VOCAB_STRIDE, KEPT = 8, 400


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, required=True, help="folder of the full golden data")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[1] / "tests" / "fixtures"
    )
    args = parser.parse_args(argv)
    np.savez_compressed(args.out / "finetune" / "training.npz", **reduced(args.golden / "finetune"))
    return 0


def reduced(source: Path) -> dict[str, np.ndarray]:
    """The arrays of training.npz."""
    out: dict[str, np.ndarray] = {"vocab_stride": np.array(VOCAB_STRIDE)}
    for name, array in np.load(source / "loss.npz").items():
        out[name] = np.ascontiguousarray(array[..., ::VOCAB_STRIDE]) if "logits" in name else array
    norms = json.loads((source / "grad_norms.json").read_text())
    for name, array in np.load(source / "grads.npz").items():
        stride = max(1, array.size // KEPT) | 1  # odd, so that all columns come up
        out[f"norm__{name}"] = np.array(norms[name])
        out[f"stride__{name}"] = np.array(stride)
        out[f"grad__{name}"] = array.reshape(-1)[::stride].copy()
    out |= dict(np.load(source / "final_params.npz"))
    return out


if __name__ == "__main__":
    raise SystemExit(main())
