"""``convert``: the converter of convert_weight.py as a command."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Same options as convert_weight.py."""
    from research.qwen.weights.command import main as convert

    return convert(list(argv) if argv is not None else None)
