"""What number formats cost in accuracy at a published shape: logits against float32, JSON on standard output.

    python scripts/bench_error.py --size 1.8b --dtypes bfloat16,int8,int4 --json error.json

Random weights of the shape are made on the spot, or kept in --work, as the published code initialises them. There the
embeddings are small, so that 24 layers of noise decide the logits; --embedding-spread 1 is nearer to trained weights,
whose embeddings outweigh what one layer adds. Each format is loaded in turn. bfloat16 and int8
are compared with the stored weights in float32; int4 with its own weights dequantised to float32 (exact activations,
float32 cache), so that the figure is the error of the kernels and not of the rounding of random weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from research.qwen.config import SIZES, with_changes  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """Options."""
    parser = argparse.ArgumentParser(description="Accuracy of number formats at a published shape.")
    parser.add_argument("--size", default="1.8b", choices=sorted(SIZES))
    parser.add_argument("--layers", type=int, help="fewer layers than published")
    parser.add_argument("--dtypes", default="bfloat16,int8,int4,int4-g64,int4-asym")
    parser.add_argument("--kv", default="bfloat16", help="cache format beside them (default bfloat16)")
    parser.add_argument("--activations", help="beside integer weights (default: as the engine chooses)")
    parser.add_argument(
        "--embedding-spread", type=float, help="standard deviation of random embeddings (0.02)"
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--model", type=Path, help="a checkpoint of yours instead of random weights")
    parser.add_argument("--work", type=Path, help="folder for the checkpoint (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="also write the result here")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run and print."""
    args = build_parser().parse_args(argv)
    work = args.work or Path(tempfile.mkdtemp(prefix="qwen-error-"))
    try:
        text = json.dumps(run(args, args.model or checkpoint(args, work)), indent=1)
    finally:
        if args.work is None:
            shutil.rmtree(work, ignore_errors=True)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def checkpoint(args: argparse.Namespace, work: Path) -> Path:
    """Random weights of the shape."""
    from scripts.bench_checkpoint import STORED, write_random

    config = SIZES[args.size]
    if args.layers:
        config = with_changes(config, num_layers=args.layers)
    spread = args.embedding_spread
    folder = work / (STORED if spread is None else f"{STORED}-{spread:g}")
    write_random(folder, config, "bfloat16", spread)
    return folder


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Figures of every format."""
    exact = logits(args, folder, dtype="float32")
    figures = {}
    for dtype in args.dtypes.split(","):
        truth = exact
        if dtype.startswith("int4"):
            truth = logits(args, folder, dtype=dtype, activations="float32", kv_dtype="float32")
        got = logits(args, folder, dtype=dtype, kv_dtype=args.kv, activations=args.activations)
        figures[dtype] = {**cosines(got, truth), "max_abs": float(np.abs(got - truth).max())}
        print(f"{dtype}: {figures[dtype]}", file=sys.stderr)
    chosen = {"kv": args.kv, "activations": args.activations or "auto"}
    return {"model": folder.name, "tokens": args.tokens, **chosen, "formats": figures}


def logits(args: argparse.Namespace, folder: Path, **options: Any) -> NDArray[np.float32]:
    """(tokens, vocab) of fixed random ids; the engine is dropped before the next one is made."""
    from research.qwen.engine import Engine

    engine = Engine.from_pretrained(folder, num_blocks=64, **options)
    ids = np.random.default_rng(0).integers(0, engine.lm.vocab_size, args.tokens).tolist()
    return engine.logits(ids)


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> dict[str, float]:
    """Of all logits together, and the least of all rows."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    dots, squares = (x * y).sum(-1), ((x * x).sum(-1), (y * y).sum(-1))
    return {
        "cosine": float(dots.sum() / np.sqrt(squares[0].sum() * squares[1].sum())),
        "cosine_of_worst_row": float((dots / np.sqrt(squares[0] * squares[1])).min()),
    }


if __name__ == "__main__":
    sys.exit(main())
