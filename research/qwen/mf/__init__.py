"""The MindFormers surface. ``import research.qwen.mf`` registers QwenForCausalLM and QwenTokenizer for YAML files."""

from research.qwen.mf.quiet import import_mindformers

import_mindformers()  # before the modules below import it

from research.qwen.mf.model import QwenForCausalLM  # noqa: E402
from research.qwen.mf.tokenizer import QwenTokenizer  # noqa: E402

__all__ = ["QwenForCausalLM", "QwenTokenizer"]
