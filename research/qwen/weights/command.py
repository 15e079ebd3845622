"""The command line of convert_weight.py: conversion both ways, and the export to Qwen2."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

from research.qwen.errors import QwenError
from research.qwen.weights.convert import (
    DEFAULT_NAME,
    MAX_SHARD,
    ProgressBar,
    Summary,
    convert,
    parse_size,
    reverse,
    silent,
)
from research.qwen.weights.dtypes import FLOATS
from research.qwen.weights.export import export_qwen2
from research.qwen.weights.outputs import cleanup_on_sigterm, size_text
from research.qwen.weights.writers import Progress


def build_parser() -> argparse.ArgumentParser:
    """The command line of convert_weight.py."""
    parser = argparse.ArgumentParser(
        prog="convert_weight.py",
        description="Convert Qwen (first generation): Hugging Face to MindSpore, back, or to Qwen2's layout.",
    )
    parser.add_argument(
        "--torch_ckpt_dir", metavar="DIR", help="Hugging Face folder: read, or written with --reverse"
    )
    parser.add_argument(
        "--mindspore_ckpt_path",
        metavar="FILE",
        help="MindSpore file, .ckpt or .safetensors: written, or read with --reverse; a folder means "
        f"{DEFAULT_NAME} in it",
    )
    parser.add_argument("--reverse", action="store_true", help="MindSpore back to a Hugging Face folder")
    parser.add_argument("--export", choices=["qwen2"], help="write a folder for engines that know Qwen2 only")
    parser.add_argument("--output", metavar="DIR", help="folder for --export")
    parser.add_argument("--dtype", choices=FLOATS, help="format of the numbers written (default: as stored)")
    parser.add_argument(
        "--config", metavar="FILE", help="config.json for --reverse (default: beside the checkpoint)"
    )
    parser.add_argument(
        "--max_shard_size", default=MAX_SHARD, help="largest file of a Hugging Face folder (default: 10GB)"
    )
    parser.add_argument("--force", action="store_true", help="replace existing files")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show the progress bar even without a terminal"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar, no summary")
    return parser


# Takes over where the checkpoint to read is quantised, else returns None: (arguments, bar, largest shard) -> summary.
Quantised = Callable[[argparse.Namespace, ProgressBar, int], Summary | None]


def main(argv: Sequence[str] | None = None, quantised: Quantised | None = None) -> int:
    """Run the command line; 0 done, 2 an error told in one line, 130 interrupted. Without ``quantised``, quantised
    checkpoints are refused."""
    parser = build_parser()
    args = parser.parse_args(argv)
    return report(lambda: _run(parser, args, tqdm_bar(args.verbose, args.quiet), quantised), args.quiet)


def report(action: Callable[[], Summary], quiet: bool) -> int:
    """Run an action that writes files, and say what it wrote or why not; the exit code."""
    start = time.monotonic()
    try:
        with cleanup_on_sigterm():
            summary = action()
    except QwenError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    for warning in summary.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if not quiet:
        print(
            f"wrote {summary.path}: {summary.tensors} tensors, {size_text(summary.nbytes)}, "
            f"{', '.join(summary.dtypes)}, {time.monotonic() - start:.1f} s"
        )
    return 0


def _run(
    parser: argparse.ArgumentParser, args: argparse.Namespace, bar: ProgressBar, quantised: Quantised | None
) -> Summary:
    needed = ("torch_ckpt_dir", "output") if args.export else ("torch_ckpt_dir", "mindspore_ckpt_path")
    missing = [f"--{name}" for name in needed if not getattr(args, name)]
    if missing:
        parser.error(f"{' and '.join(missing)} required")
    if args.reverse and args.export:
        parser.error("--reverse and --export exclude each other")
    shard = parse_size(args.max_shard_size)
    if args.export:
        return export_qwen2(args.torch_ckpt_dir, args.output, args.dtype, args.force, bar, shard)
    done = quantised(args, bar, shard) if quantised is not None else None
    if done is not None:
        return done
    if args.reverse:
        return reverse(
            args.mindspore_ckpt_path, args.torch_ckpt_dir, args.dtype, args.force, bar, shard, args.config
        )
    return convert(args.torch_ckpt_dir, args.mindspore_ckpt_path, args.dtype, args.force, bar)


def tqdm_bar(verbose: bool, quiet: bool, label: str = "converting", delay: float = 0) -> ProgressBar:
    """A bar on standard error, from ``delay`` seconds on; with ``verbose`` also where that is no terminal."""
    if quiet or not (verbose or sys.stderr.isatty()):
        return silent

    def bar(total: int) -> Progress:
        try:
            from tqdm import tqdm
        except ImportError:
            return silent(total)
        shown = tqdm(total=total, unit="B", unit_scale=True, desc=label, file=sys.stderr, delay=delay)

        def progress(count: int) -> None:
            shown.update(count)
            if shown.n >= total:
                shown.close()

        return progress

    return bar


if __name__ == "__main__":
    sys.exit(main())
