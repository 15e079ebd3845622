"""``info``: what a checkpoint or an adapter is, whether it is whole, what can run it here. Loads no weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import prod
from pathlib import Path

from research.qwen.cli.common import quieten
from research.qwen.config import SIZES, QwenConfig
from research.qwen.errors import CheckpointError, KernelError, VocabularyError


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m research.qwen.cli info",
        description="Describe a checkpoint (default: the embedded demo model) and this machine.",
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="folder or weights file, of a model or an adapter"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show log lines")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    quieten(args.verbose)
    from research.qwen.demo import demo_folder
    from research.qwen.weights.adapters import is_adapter

    path = Path(args.model) if args.model else demo_folder()
    about = describe_adapter(path) if is_adapter(path) else describe_model(path)
    for line in [*about, "", *describe_machine()]:
        print(line)
    return 0


def describe_model(path: Path) -> list[str]:
    """Lines about the checkpoint; raises what opening it raises."""
    from research.qwen.model.quantise import Plan, quantised_source
    from research.qwen.weights.names import expected
    from research.qwen.weights.readers import open_checkpoint

    if not path.exists():
        raise CheckpointError(f"no such checkpoint: {path}")
    folder = path if path.is_dir() else path.parent
    config = QwenConfig.from_folder(folder)
    checkpoint = open_checkpoint(path)
    source = quantised_source(checkpoint, config, Plan(), progress=False)
    shapes = expected(config)
    total = sum(prod(shape) for shape in shapes.values())
    count = len(checkpoint.names())
    weights = sum(checkpoint.tensor(name).nbytes for name in checkpoint.names())
    stored = {source.format(name) for name in shapes}
    known = next((size for size, c in SIZES.items() if c.hidden_size == config.hidden_size), "own size")
    cache = 2 * config.num_layers * config.hidden_size * 4
    return [
        f"checkpoint    {path}",
        f"model         Qwen, first generation ({known}): {total / 1e6:,.1f} M parameters, {count} tensors, whole",
        f"shape         hidden {config.hidden_size}, layers {config.num_layers}, heads {config.num_heads} x "
        f"{config.head_dim}, MLP {config.mlp_width}, vocabulary rows {config.vocab_size}",
        f"context       {config.seq_length} trained, {config.max_length} at most; dynamic NTK "
        f"{'on' if config.use_dynamic_ntk else 'off'}, log-n {'on' if config.use_logn_attn else 'off'}",
        f"stored as     {', '.join(sorted(stored))}: {weights / 2**20:,.1f} MiB",
        f"KV cache      {cache / 2**10:,.1f} KiB a token in float32",
        f"vocabulary    {describe_vocabulary(folder)}",
    ]


def describe_adapter(path: Path) -> list[str]:
    """Lines about a LoRA adapter; raises what reading it raises."""
    from research.qwen.weights.adapters import load_adapter

    adapter = load_adapter(path)
    config, updates = adapter.config, adapter.updates()
    size = sum(array.size for array in adapter.tensors.values())
    whole = ", ".join(config.modules_to_save) or "none"
    targets = config.targets if isinstance(config.targets, str) else ", ".join(config.targets)
    factors = sorted({update.scale for update in updates.values()})
    return [
        f"adapter       {adapter.where}",
        f"base          {config.base or 'not named'}",
        f"rank          {', '.join(map(str, sorted({update.rank for update in updates.values()}))) or 'none'}; factor "
        f"{', '.join(f'{factor:g}' for factor in factors) or 'none'}",
        f"targets       {targets}: {len(updates)} matrices, {size / 1e6:,.2f} M parameters, whole",
        f"beside them   {whole}"
        + (" (merge it: such an adapter cannot share a base)" if adapter.saved else ""),
    ]


def describe_vocabulary(folder: Path) -> str:
    """Where the vocabulary is, or how to get one."""
    from research.qwen.text.tokenizer import QwenTokenizer, find_vocab_file

    try:
        tokenizer = QwenTokenizer(find_vocab_file(None, folder))
    except VocabularyError as error:
        return f"none: {error}"
    return f"{tokenizer.vocab_file} ({len(tokenizer)} tokens)"


def describe_machine() -> list[str]:
    """Lines about the backends."""
    from research.qwen.kernels.build import library_path
    from research.qwen.kernels.devices import device_available

    try:
        cpu = f"ready ({library_path().name})"
    except KernelError as error:
        cpu = f"not available: {error}"
    ascend = "device found" if device_available() else "no device found by MindSpore"
    return [
        f"backend cpu        {cpu}",
        f"backend ascend     {ascend}",
        "backend reference  ready (slow, the judge)",
    ]
