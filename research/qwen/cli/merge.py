"""``merge``: a base model and a LoRA adapter become one model in a Hugging Face folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from research.qwen.weights.dtypes import FLOATS

if TYPE_CHECKING:
    from research.qwen.weights.convert import Summary

EPILOG = """\
BASE is a Hugging Face folder, a converted one, or a .ckpt / .safetensors file with config.json beside it. ADAPTER is
the folder peft or 'finetune' wrote (adapter_config.json and adapter_model.safetensors, .bin or .ckpt). OUT is a new
folder; it converts, quantises, exports and serves like any other model.

A quantised BASE is refused: merge into the original model and quantise the result. With --dtype float32 its exact
values are taken instead."""


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m research.qwen.cli merge",
        description="Add a LoRA adapter to its base model: W + scale * B A, written block by block.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", metavar="BASE", help="model to add to")
    parser.add_argument("adapter", metavar="ADAPTER", help="adapter's folder, or its weights file")
    parser.add_argument("target", metavar="OUT", help="folder to write")
    parser.add_argument("--dtype", choices=FLOATS, help="format of the numbers written (default: the base's)")
    parser.add_argument(
        "--max-shard-size", default="10GB", metavar="SIZE", help="largest file (default: 10GB)"
    )
    parser.add_argument("--force", action="store_true", help="replace existing files")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no summary")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 2 an error told in one line, 130 interrupted."""
    args = build_parser().parse_args(argv)
    from research.qwen.weights.command import report

    return report(lambda: _run(args), args.quiet)


def _run(args: argparse.Namespace) -> Summary:
    from research.qwen.model.quantised_files import is_quantised
    from research.qwen.weights.adapters import is_adapter
    from research.qwen.weights.command import tqdm_bar
    from research.qwen.weights.convert import parse_size
    from research.qwen.weights.merging import merge

    bar = tqdm_bar(verbose=True, quiet=args.quiet, label="merging", delay=2)
    shard = parse_size(args.max_shard_size)
    if args.dtype == "float32" and not is_adapter(args.base) and is_quantised(args.base):
        return _merge_quantised(args, shard)
    return merge(args.base, args.adapter, args.target, args.dtype, args.force, bar, shard)


def _merge_quantised(args: argparse.Namespace, shard: int) -> Summary:
    """Into the exact float32 values of a quantised base."""
    from research.qwen.model.quantise import Plan, quantised_source
    from research.qwen.model.quantised_files import output_tensors
    from research.qwen.weights.command import tqdm_bar
    from research.qwen.weights.convert import open_with_config
    from research.qwen.weights.merging import write_merged

    checkpoint, config = open_with_config(args.base)
    tensors = output_tensors(quantised_source(checkpoint, config, Plan("float32"), progress=False))
    bar = tqdm_bar(verbose=True, quiet=args.quiet, label="merging", delay=2)
    return write_merged(
        checkpoint.folder, config, tensors, args.adapter, args.target, "float32", args.force, bar, shard
    )
