"""``convert``: the converter of convert_weight.py as a command, for plain and quantised checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from research.qwen.errors import CheckpointError

if TYPE_CHECKING:
    from research.qwen.weights.convert import ProgressBar, Summary


def main(argv: Sequence[str] | None = None) -> int:
    """Same options as convert_weight.py."""
    from research.qwen.weights.command import main as convert

    return convert(list(argv) if argv is not None else None, quantised=convert_quantised)


def convert_quantised(args: argparse.Namespace, bar: ProgressBar, shard: int) -> Summary | None:
    """An official Int4 / Int8 folder to our packed safetensors, or (``--reverse``) back; None for a plain source.

    ``--dtype float32`` writes the dequantised weights, which is exact; other formats would round and are refused.
    """
    from research.qwen.model import quantised_files as files
    from research.qwen.model.quantise import Plan

    source = args.mindspore_ckpt_path if args.reverse else args.torch_ckpt_dir
    if not files.is_quantised(source):
        return None
    if args.dtype not in (None, "float32"):
        raise CheckpointError(
            f"{source} is quantised and cannot become {args.dtype}: leave --dtype out to keep the integers, or use "
            "--dtype float32, which holds them exactly"
        )
    if not args.reverse:
        return files.write_quantised(source, args.mindspore_ckpt_path, Plan(args.dtype), args.force, bar)
    write = files.write_gptq if args.dtype is None else files.write_dequantised
    return write(source, args.torch_ckpt_dir, args.force, bar, shard, args.config)
