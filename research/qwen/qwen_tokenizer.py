"""``from qwen_tokenizer import QwenTokenizer``: the published name, with PYTHONPATH=research/qwen."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("research") is None:  # neither installed nor run from the repository's root
    sys.path.append(str(Path(__file__).resolve().parents[2]))

import research.qwen.mf  # noqa: E402, F401  registers the classes for YAML files
from research.qwen.mf.tokenizer import QwenTokenizer  # noqa: E402

__all__ = ["QwenTokenizer"]
