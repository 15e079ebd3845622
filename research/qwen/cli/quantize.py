"""``quantize``: write a checkpoint with integer weights once; the next start only maps it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from research.qwen.errors import ConfigError

if TYPE_CHECKING:
    from research.qwen.weights.convert import Summary

EPILOG = """\
formats: int8 (one scale a row), int4 (groups of 128 inputs), int4-g64, int4-asym (zero points), int4-g64-asym,
int8-g128; for the other two matrices also float32, bfloat16, float16.

OUT is a .safetensors file, or a folder that gets qwen.safetensors; config.json, generation_config.json, the vocabulary
and a YAML file that runs it are written beside it."""


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m research.qwen.cli quantize",
        description="Quantise a checkpoint: a Hugging Face folder, a converted one, or a .ckpt / .safetensors file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint to read")
    parser.add_argument("target", metavar="OUT", help="file or folder to write")
    parser.add_argument("--dtype", required=True, help="format of the layers' matrices: int8, int4, ...")
    parser.add_argument(
        "--lm-head-dtype", metavar="DTYPE", help="of the output matrix (default: int8 or int4-g64)"
    )
    parser.add_argument(
        "--embedding-dtype", metavar="DTYPE", help="of the embedding table (default: as stored)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: all this process may use)")
    parser.add_argument("--force", action="store_true", help="replace existing files")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no summary")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 2 an error told in one line, 130 interrupted."""
    args = build_parser().parse_args(argv)
    from research.qwen.weights.command import report

    return report(lambda: _run(args), args.quiet)


def _run(args: argparse.Namespace) -> Summary:
    from research.qwen.model.quantise import Plan, native_quantiser
    from research.qwen.model.quantised_files import write_quantised
    from research.qwen.quant.schemes import Scheme
    from research.qwen.weights.command import tqdm_bar

    dtype = str(Scheme.parse(args.dtype))
    plan = Plan(dtype, args.lm_head_dtype, args.embedding_dtype)
    threads = args.threads if args.threads is not None else len(os.sched_getaffinity(0))
    if not 1 <= threads <= 1024:
        raise ConfigError(f"--threads must be 1 to 1024, got {threads}")
    bar = tqdm_bar(verbose=True, quiet=args.quiet, label=f"quantising to {dtype}", delay=2)
    quantiser = native_quantiser("reference", threads)  # without a compiler, slowly in NumPy
    return write_quantised(args.source, args.target, plan, args.force, bar, quantiser)
