"""The embedded demo model: a tiny Qwen that holds a few dialogues by heart. See README.md in this folder."""

from __future__ import annotations

from pathlib import Path


def demo_folder() -> Path:
    """The model folder, in the published Hugging Face layout."""
    return Path(__file__).resolve().parent / "model"
